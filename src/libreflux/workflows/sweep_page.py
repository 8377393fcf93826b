"""The files of a sweep to look at: a labelled sheet of its pictures, and a page with table, curves and sheet."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from libreflux import __version__
from libreflux.files import atomic_write_bytes
from libreflux.probing.metrics.measures import Estimate
from libreflux.probing.metrics.paired import relative_loss
from libreflux.probing.report import html
from libreflux.probing.report.plots import DASHES, Series, lines
from libreflux.probing.trained import TrainingCheck
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import open_png
from libreflux.workflows.sweep_measure import Judged
from libreflux.workflows.sweep_table import SweepRow, SweepTable

SIDE = 256
"""Pixels of a picture on the sheet, at most."""
EMBEDDED = 2400
_SLOPE = "calibration slope"


def write_sheet(
    path: Path,
    folder: Path,
    rows: Sequence[SweepRow],
    prompts: Sequence[str],
    seeds: Sequence[int],
    scales: Sequence[float],
) -> None:
    """Writes the sheet, a PNG: a row for each candidate, a column for each prompt, seed and guidance scale.

    Args:
        path: where to; replaced.
        folder: what the pictures' files are relative to.
        rows: in the order of the table.
        prompts, seeds: of the pictures.
        scales: guidance scales, numbers.
    """
    each = [(text, seed) for text in prompts for seed in seeds]
    several = len(seeds) > 1
    heads = [
        f"guidance {scale:g}, {textwrap.shorten(text, 60, placeholder='…')}{f', seed {seed}' if several else ''}"
        for text, seed in each
        for scale in scales
    ]
    cells = [
        [_small(folder / row.pictures[at][one]) for one in range(len(each)) for at in range(len(scales))]
        for row in rows
    ]
    held = io.BytesIO()
    sheet(cells, [row.name for row in rows], heads).save(held, "PNG", optimize=True)
    atomic_write_bytes(path, held.getvalue())


def page(
    name: str,
    table: SweepTable,
    judged: Sequence[Judged],
    trained: TrainingCheck | None,
    notes: Sequence[str],
    drawn: Path | None,
) -> str:
    """The page, HTML.

    Args:
        name: of the run.
        table: of the candidates.
        judged: what they were judged by.
        trained: what is known of the pictures and the run's training.
        notes: what else a reader must know, a sentence each.
        drawn: the sheet; None where nothing was drawn.
    """
    remark = f" ({escape(trained.remark)})" if trained is not None and trained.remark else ""
    verdict = "Not known: what the run was trained on." if trained is None else f"Held out? {trained.verdict}."
    told = "".join(f"<li>{escape(note)}</li>" for note in [verdict, *notes])
    body = f"""<h1>Which checkpoint of {escape(name)}?{remark}</h1>
<p class="verdict">{escape(table.sentence)}</p>
<ul class="faint">{told}</ul>
<h2>The candidates, by {"loss" if table.by == "loss" else "calibration"}</h2>
<p class="faint">On {table.measured} pictures, each under its caption, with the same noise for all; means over
{len(table.sigmas)} noise levels. In brackets 95 % intervals: of a value, what other pictures would give; of
a difference, together for all pairs of candidates. “Wins”: share of resamples of the pictures in which it is best.</p>
{html.table(_heads(table), [_cells(row, table) for row in table.rows], 1)}
<h2>By noise level</h2>
<div class="plots">{_losses(table, judged)}{_slopes(table)}</div>
<p class="faint">Bands are 95 % intervals, each for its noise level alone; those of the losses are of the paired
difference.</p>
<details><summary>All candidates by noise level</summary>{_all_levels(table)}</details>
{_sheet(drawn)}
<p class="faint">libreflux {__version__}</p>"""
    return html.document(f"libreflux: which checkpoint of {name}?", f"<style>{html.SWEEP_STYLE}</style>{body}")


def _heads(table: SweepTable) -> tuple[str, ...]:
    first = "loss" if table.by == "loss" else "|1 − slope|"
    return ("candidate", first, "to the last", "to the best", "wins", "slope", "gap")


def _cells(row: SweepRow, table: SweepTable) -> list[str]:
    return [
        row.name,
        f"{row.score:.4f} [{row.low:.4f}, {row.high:.4f}]",
        "—" if row.is_last else difference(row.to_last),
        "—" if row is table.best else difference(row.to_best),
        f"{row.wins:.0%}",
        f"{np.mean(row.slope.value):.3f}",
        f"{row.gap:.2%}",
    ]


def difference(found: tuple[float, float, float]) -> str:
    """A difference with its interval, as text."""
    middle, low, high = found
    return f"{middle:+.5f} [{low:+.5f}, {high:+.5f}]"


def shown(table: SweepTable) -> list[SweepRow]:
    """The rows that the plots have: the last, the best, the best of each other kind, and the worst; five at most."""
    firsts = [next((row for row in table.rows if row.kind in kinds), None) for kinds in (("lerp",), ("width", "cells"))]
    chosen = [table.last, table.best, *firsts, table.rows[-1]]
    return list({id(row): row for row in chosen if row is not None}.values())[: len(DASHES)]


def _losses(table: SweepTable, judged: Sequence[Judged]) -> str:
    index = {id(row): at for row, at in zip(table.rows, table.order, strict=True)}
    reference = judged[index[id(table.last)]].moments
    series = []
    for number, row in enumerate(shown(table)):
        found = relative_loss(judged[index[id(row)]].moments, reference)
        points = [(sigma, *map(float, each)) for sigma, each in zip(table.sigmas, found, strict=True)]
        series.append(Series(row.name, number, points))  # type: ignore[arg-type]
    title = "Loss, against the last checkpoint's"
    return lines(series, title=title, x="noise level sigma", y="difference", level=0.0, percent=True)


def _slopes(table: SweepTable) -> str:
    series = [Series(row.name, number, _points(table.sigmas, row.slope)) for number, row in enumerate(shown(table))]
    return lines(series, title="Calibration slope; 1 is right", x="noise level sigma", y=_SLOPE, level=1.0)


def _points(sigmas: Sequence[float], found: Estimate) -> list[tuple[float, float, float, float]]:
    rows = zip(sigmas, found.value, found.low, found.high, strict=True)
    return [(float(s), float(value), float(low), float(high)) for s, value, low, high in rows]


def _all_levels(table: SweepTable) -> str:
    heads = ("candidate", *(f"{what} at {sigma:g}" for what in ("loss", "slope") for sigma in table.sigmas))
    rows = [
        [row.name, *(f"{value:.4f}" for value in row.loss.value), *(f"{value:.3f}" for value in row.slope.value)]
        for row in table.rows
    ]
    return html.table(heads, rows, 1)


def _sheet(drawn: Path | None) -> str:
    if drawn is None:
        return ""
    picture = open_png(drawn)
    data = html.jpeg(picture, max(EMBEDDED, picture.height), 85)
    return (
        "<h2>Drawn</h2><p class='faint'>One noise for all pictures of a column, the candidates in the order of the"
        f" table. In full: <code>{escape(drawn.name)}</code>, beside this page.</p>"
        f'<div class="sheet">{html.image(data, "pictures of all candidates", "jpeg")}</div>'
    )


def _small(path: Path) -> Image.Image:
    picture = open_png(path).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture
