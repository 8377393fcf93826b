"""Pictures that cannot be used: listed, counted, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from libreflux.data.sources import Quarantined
from libreflux.errors import DataError
from libreflux.files import atomic_write_text
from libreflux.printing import get_logger

QUARANTINE = "quarantine.jsonl"
logger = get_logger(__name__)


def report_quarantine(folder: Path, found: Sequence[Quarantined], usable: int, share: float) -> None:
    """Writes ``quarantine.jsonl``, a line with path, reason and id for each, and says how many there are.

    Those that min_size leaves out are listed with them and count for nothing: they are left out as the recipe says.

    Args:
        folder: of the cache.
        found: pictures that are not used.
        usable: how many others there are.
        share: of all pictures, in [0, 1], that may be unusable.

    Raises:
        DataError: more are, or all; the first is named. The list is written if it says more than this line.
    """
    path = folder / QUARANTINE
    bad = [each for each in found if not each.too_small]
    too_many = len(bad) > share * (len(bad) + usable) or (bad and not usable)
    if not (too_many and len(bad) == 1):
        _write(path, found)
    if too_many and len(bad) == 1:
        repair = "make it readable" if bad[0].reason.startswith("cannot be read") else "repair it"
        hint = f"{repair}, remove it, or raise max_quarantined"
        raise DataError(bad[0].reason, where=bad[0].path, hint=hint)
    if too_many:
        told = f"{len(bad)} of {len(bad) + usable} pictures cannot be used, the first: {bad[0].reason}"
        hint = f"repair or remove those listed in {path}, or raise max_quarantined (now {share:g})"
        raise DataError(told, where=bad[0].path, hint=hint)
    if found and not usable:
        raise DataError(f"every picture is {found[0].reason}", where=found[0].path, hint="lower min_size")
    if bad:
        total = len(bad) + usable
        logger.warning("%d of %d pictures cannot be used and are left out, see %s", len(bad), total, path)


def _write(path: Path, found: Sequence[Quarantined]) -> None:
    rows = [{"path": str(each.path), "reason": each.reason, "id": each.id} for each in found]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text != before:
        atomic_write_text(path, text)
