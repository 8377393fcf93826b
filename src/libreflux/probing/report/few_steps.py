"""The page of a health check of few steps: what was kept and learnt, how that is defined, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from libreflux import __version__
from libreflux.printing import counted
from libreflux.probing.few_steps import MEANINGS, Point
from libreflux.probing.report import html
from libreflux.probing.report.labels import figure
from libreflux.probing.report.plots import Series, lines
from libreflux.probing.results import Measure
from libreflux.probing.shares import Share
from libreflux.sample.metadata import open_png

SIDE = 160
"""Pixels of a picture on the page, at most."""
Rows = Sequence[tuple[str, Sequence[str]]]
"""(name of a model, its pictures' files) each."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a page says of how it was measured.

    Attributes:
        model, distilled, broken: names.
        steps, guidance, resolution: of all pictures.
        data: name of the new pictures' folder.
        pictures, prompts: how many.
        keep: the share of few-step ability that is enough.
        held_out: whether the new pictures were held out of the training; "" where nobody knows.
        remark: what makes the shares doubtful; "" where nothing does.
    """

    model: str
    distilled: str
    broken: str
    steps: int
    guidance: float
    resolution: int
    data: str
    pictures: int
    prompts: int
    keep: float
    held_out: str
    remark: str


def page(
    shown: Shown,
    verdict: str,
    points: Sequence[Point],
    ends: Sequence[Measure],
    folder: Path,
    sheets: Sequence[tuple[Sequence[str], Rows]],
) -> str:
    """The page, HTML.

    Args:
        shown: how it was measured.
        verdict: the sentence that leads.
        points: of one adapter, or of a run's checkpoints by step.
        ends: what the ends of both ways measure.
        folder: what the pictures' files are relative to.
        sheets: (prompts, rows) of the new captions, and of the other prompts.
    """
    several = len(points) > 1
    what = f"a run on {shown.model}" if several else f"{points[0].name} on {shown.model}"
    (new, new_rows), (others, other_rows) = sheets
    body = "\n".join(
        [
            f"<h1>What did {escape(what)} keep, and what did it learn?</h1>",
            f'<p class="verdict">{escape(verdict)}</p>',
            _how(shown),
            _curve(points, shown.keep) if several else "",
            _shares(points),
            "<h2>Pictures of other prompts</h2><p class='faint'>Few-step ability is measured on these.</p>",
            _sheet(others, other_rows, folder),
            "<h2>Pictures of the new captions</h2><p class='faint'>What was learnt is measured on these.</p>",
            _sheet(new, new_rows, folder),
            _guidance(points),
            _definitions(shown),
            _every(points, ends),
            f'<p class="faint">libreflux {__version__}</p>',
        ]
    )
    title = f"libreflux: few steps kept by {what}"
    return html.document(title, f"<style>{html.SWEEP_STYLE}</style>{body}")


def _how(shown: Shown) -> str:
    told = [
        f"All pictures: {counted(shown.steps, 'step')}, guidance {shown.guidance:g}, {shown.resolution} pixels, the "
        "same seeds for every model.",
        f"Kept: on {counted(shown.prompts, 'prompt')} outside of what was learnt, between {shown.distilled} and "
        f"{shown.broken}.",
        f"Learnt: on {counted(shown.pictures, 'picture')} of {shown.data}."
        + (f" Were they held out of the training? {shown.held_out}." if shown.held_out else ""),
        *([f"Take care: {shown.remark}."] if shown.remark else []),
    ]
    return f'<ul class="faint">{"".join(f"<li>{escape(one)}</li>" for one in told)}</ul>'


def _curve(points: Sequence[Point], keep: float) -> str:
    series = []
    for number, (label, which) in enumerate((("kept", 0), ("learnt", 1))):
        rows = []
        for one in points:
            found = one.leading[which]
            if one.step is not None and not found.noisy:
                rows.append((float(one.step), found.value, found.low, found.high))
        series.append(Series(label, number, rows))
    drawn = lines(series, title="Kept and learnt, by step", x="step", y="share", level=keep, percent=True)
    note = f"Bands are 95 % intervals. The thin line is {keep:.0%}. What is too noisy has no mark."
    return f'<h2>The curve</h2><div class="plots" style="max-width: 36em">{drawn}</div><p class="faint">{note}</p>'


def _shares(points: Sequence[Point]) -> str:
    kept, learnt = (list(dict.fromkeys(one.by for point in points for one in getattr(point, name))) for name in PARTS)
    kept, learnt = sorted(kept, key=list(MEANINGS).index), sorted(learnt)
    heads = ("", "kept", "learnt", *(f"kept: {by}" for by in kept), *(f"learnt: {by}" for by in learnt))
    rows = [
        [
            one.name + (" (unchanged)" if one.unchanged else ""),
            one.leading[0].text,
            one.leading[1].text,
            *(_by(one.kept, by) for by in kept),
            *(_by(one.learnt, by) for by in learnt),
        ]
        for one in points
    ]
    note = (
        "The first two columns are the lowest of the others that are neither too noisy nor wider than the whole way. "
        "In brackets 95 % intervals."
    )
    return f'<h2>Shares</h2><p class="faint">{note}</p>{html.table(heads, rows, 1)}'


PARTS = ("kept", "learnt")


def _by(shares: Sequence[Share], by: str) -> str:
    return next((one.text for one in shares if one.by == by), "–")


def _sheet(texts: Sequence[str], rows: Rows, folder: Path) -> str:
    heads = "".join(f"<th>{escape(text)}</th>" for text in texts)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f"<td>{_image(folder / file, f'{name}, {text}')}</td>" for file, text in zip(files, texts, strict=True)
        )
        + "</tr>"
        for name, files in rows
    )
    return f'<div class="scroll"><table class="pictures"><tr><th></th>{heads}</tr>{body}</table></div>'


def _image(path: Path, alt: str) -> str:
    picture: Image.Image = open_png(path).convert("RGB")
    return html.image(html.jpeg(picture, SIDE, 80), alt, "jpeg")


def _guidance(points: Sequence[Point]) -> str:
    rows = [[one.name, figure(one.guidance[1])] for one in points if one.guidance is not None]
    first = next((one.guidance[0] for one in points if one.guidance is not None), None)
    if first is None:
        return ""
    table = html.table(("", "answer to guidance 1 → 3"), [["distilled", figure(first)], *rows], 1)
    return f"""<h2>Guidance</h2><p class="faint">How far a picture moves when guidance goes from 1 to 3, same seed, in
the judge's features (root mean square). It is told, not scored: more is not better by itself.</p>{table}"""


def _definitions(shown: Shown) -> str:
    meanings = "".join(f"<li><b>{escape(by)}</b>: {escape(told)}</li>" for by, told in MEANINGS.items())
    return f"""<h2>Definitions</h2>
<p>d is a distance of two sets of pictures in the judge's features: FD (Fréchet) or KD (kernel).</p>
<pre>learnt = (d(distilled, NEW) − d(adapted, NEW)) / (d(distilled, NEW) − d(half of NEW, other half))
kept   = 1 − (m(adapted) − m(distilled)) / (m(broken) − m(distilled))</pre>
<p>NEW are the new pictures once they have been through the VAE. The distilled and the adapted model draw their
captions. All three sets are cut into the same halves, and each half is compared with the other half of NEW, so that
what few pictures add to a distance is the same for all. 0 % is the distilled model, 100 % the new pictures.</p>
<p>m is one of the measures below, on prompts outside of what was learnt, in the distilled model's own steps. Distances
are from pictures that the distilled model draws from <i>other</i> seeds, so that 100 % kept is another seed of itself.
0 % is {escape(shown.broken)}. The lowest share leads, of those whose interval is not wider than the whole way.</p>
<ul>{meanings}</ul>
<p>Intervals are over pictures and prompts, of 200 bootstrap replicates; all models are resampled alike. They
are widened where these are few (Student's t, and Newcombe's of what is right or wrong). The lowest of several is low by
chance too: the upper end of the leading one allows for that. They say nothing of other seeds of the training. “Too
noisy”: the interval of the denominator touches 0, so that the two ends cannot be told apart, or the share could be
anything. A distance counts a change of look as a loss: where an adapter is to change the look of every picture, read
accuracy and sharpness, if the judge can read the new look. What is learnt is a distance too: pictures that fall apart
may come nearer to NEW as well. Look at them.</p>"""


def _every(points: Sequence[Point], ends: Sequence[Measure]) -> str:
    rows = [[row.name, str(row.at.get("by", "")), str(row.at["of"]), figure(row)] for row in ends]
    for one in points:
        rows += [[row.name, str(row.at.get("by", "")), one.name, figure(row)] for row in one.measures if _is_own(row)]
    rows.sort(key=lambda row: (row[0], row[1]))
    table = html.table(("", "by", "of", "value"), rows, 3)
    return f"<details><summary>Every value that the shares are made of ({len(rows)})</summary>{table}</details>"


def _is_own(row: Measure) -> bool:
    return row.at["of"] == "adapted"
