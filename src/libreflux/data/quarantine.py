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

    Args:
        folder: of the cache.
        found: pictures that cannot be used.
        usable: how many others there are.
        share: of all pictures, in [0, 1], that may be unusable.

    Raises:
        DataError: more are, or all; the first is named. The list is written if it says more than this line.
    """
    path = folder / QUARANTINE
    too_many = len(found) > share * (len(found) + usable) or (found and not usable)
    if not (too_many and len(found) == 1):
        _write(path, found)
    if too_many and len(found) == 1:
        mend = "repair it, remove it, or raise max_quarantined"
        raise DataError(found[0].reason, where=found[0].path, mend=mend)
    if too_many:
        told = f"{len(found)} of {len(found) + usable} pictures cannot be used, the first: {found[0].reason}"
        mend = f"repair or remove those listed in {path}, or raise max_quarantined (now {share:g})"
        raise DataError(told, where=found[0].path, mend=mend)
    if found:
        total = len(found) + usable
        logger.warning("%d of %d pictures cannot be used and are left out, see %s", len(found), total, path)


def _write(path: Path, found: Sequence[Quarantined]) -> None:
    rows = [{"path": str(each.path), "reason": each.reason, "id": each.id} for each in found]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text != before:
        atomic_write_text(path, text)
