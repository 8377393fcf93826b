"""What benchmarks/finetune.py writes: a CSV file, and a page of plots and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor

from libreflux.files import atomic_write_text
from libreflux.probing.report import html, plots

COLUMNS = ("set", "model", "seeds", "step", "measure", "guidance", "value", "low", "high", "n")
Shown = Mapping[tuple[str, str, int, float], Tensor]
"""(set, model, step, guidance) to a picture [3, H, W] in [-1, 1]."""


@dataclass(frozen=True)
class Row:
    """A measure of one set and model after some steps."""

    set: str
    model: str
    seeds: int
    step: int
    measure: str
    guidance: float | None
    value: float
    low: float
    high: float
    n: int

    @property
    def cells(self) -> list[str]:
        """By `COLUMNS`."""
        numbers = [f"{each:.6g}" for each in (self.value, self.low, self.high)]
        scale = "" if self.guidance is None else f"{self.guidance:g}"
        return [self.set, self.model, str(self.seeds), str(self.step), self.measure, scale, *numbers, str(self.n)]


def write(out: Path, rows: Sequence[Row], confusions: Mapping[str, str], shown: Shown) -> None:
    """The CSV file and the page.

    Args:
        out: without their suffixes.
        confusions: what the judge makes of real pictures, by set.
    """
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.cells for row in rows)
    atomic_write_text(out.with_suffix(".csv"), held.getvalue())
    parts = []
    for name in dict.fromkeys(row.set for row in rows):
        own = [row for row in rows if row.set == name]
        drawings = [_plot(own, "loss", None, "held-out loss of the set", "loss, MSE")]
        for measure, y in (("likeness", "share judged to be the set's"), ("sharpness", "of 255")):
            for scale in sorted({row.guidance for row in own if row.guidance is not None}):
                drawings.append(_plot(own, measure, scale, f"{measure}, guidance {scale:g}", y))
        table = html.table(COLUMNS, [row.cells for row in own], 6)
        details = f"<details><summary>Every number ({len(own)})</summary>{table}</details>"
        plotted = f'<div class="plots">{"".join(drawings)}</div>'
        pictures = _pictures(shown, name)
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(confusions[name])}</p>{plotted}{pictures}{details}")
    bands = "Bands: 95 % intervals over pictures and, where there are several, over seeds of the training."
    said = f'<p class="faint">{bands}</p>'
    page = html.document(
        "Is a freed model easier to fine-tune?", f"<h1>Is a freed model easier to fine-tune?</h1>{said}{''.join(parts)}"
    )
    atomic_write_text(out.with_suffix(".html"), page)


def _pictures(every: Shown, name: str) -> str:
    """The first prompt's picture of every model and guidance, before and after the training; the first seed's."""
    shown = {key[1:]: pixels for key, pixels in every.items() if key[0] == name}
    steps, scales = {key[1] for key in shown}, {key[2] for key in shown}
    columns = [(step, scale) for scale in sorted(scales) for step in (min(steps), max(steps))]
    heads = "".join(f"<th>guidance {scale:g}, step {step}</th>" for step, scale in columns)
    lines = []
    for model in dict.fromkeys(key[0] for key in shown):
        cells = [_cell(shown[model, step, scale], f"{model}, step {step}") for step, scale in columns]
        lines.append(f"<tr><th>{escape(model)}</th>{''.join(cells)}</tr>")
    return f'<table class="pictures"><tr><th></th>{heads}</tr>{"".join(lines)}</table>'


def _cell(pixels: Tensor, alt: str) -> str:
    picture = Image.fromarray(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())
    return f"<td>{html.image(html.jpeg(picture, 128, 85), alt, 'jpeg')}</td>"


def _plot(rows: Sequence[Row], measure: str, scale: float | None, title: str, y: str) -> str:
    kept = [row for row in rows if (row.measure, row.guidance) == (measure, scale)]
    series = [
        plots.Series(model, number, [(row.step, row.value, row.low, row.high) for row in kept if row.model == model])
        for number, model in enumerate(dict.fromkeys(row.model for row in kept))
    ]
    return plots.lines(series, title=title, x="steps of training", y=y, percent=measure == "likeness")
