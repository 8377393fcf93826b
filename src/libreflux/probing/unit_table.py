"""What was measured of each picture and prompt, as rows of a table: for statistics of one's own."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from libreflux.files import atomic_write_text
from libreflux.probing.report.labels import place
from libreflux.probing.report.page import model_labels
from libreflux.probing.results import Result

COLUMNS = ("model", "measure", "at", "over", "number", "id", "text", "value", "above", "below", "root")
"""A row is a picture or a prompt: its number and text (a picture's id too), its own value, and what the measure sums.

The measure of all of them is Σ above / Σ below, and its root where `root` is 1.
"""


def rows(results: Sequence[Result]) -> Iterator[list[str]]:
    """A row for each picture or prompt of each measure that is a ratio of sums, by `COLUMNS`."""
    for result, label in zip(results, model_labels(results), strict=True):
        names = result.names
        for one in result.measures:
            if one.units is None:
                continue
            ids = names.get("pictures", ()) if one.units.over == "pictures" else ()
            texts = names.get({"pictures": "captions", "prompts": "prompts"}.get(one.units.over, ""), ())
            above, below = one.units.arrays()
            for number, value in enumerate(one.units.values().tolist()):
                told = [ids[number] if number < len(ids) else "", texts[number] if number < len(texts) else ""]
                numbers = [_text(value), _text(above[number]), _text(below[number]), str(int(one.units.root))]
                yield [label, one.name, place(one.at), one.units.over, str(number), *told, *numbers]


def write_table(results: Sequence[Result], path: Path) -> Path:
    """Writes `rows` as CSV (RFC 4180 but for line ends of Unix), UTF-8, atomically."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(results))
    atomic_write_text(path, held.getvalue())
    return path


def _text(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else ""
