"""The page that `libreflux demo` ends with: the probe's, with what was done around it, and a grid as PNG."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from libreflux.files import atomic_write_bytes
from libreflux.printing import clock
from libreflux.probing.freedom import FreedomRow
from libreflux.probing.report.html import image
from libreflux.probing.report.page import write_page
from libreflux.probing.report.pictures import grids
from libreflux.probing.results import Result
from libreflux.sample.grid import sheet

LABELS = ("distilled", "set free", "original")


@dataclass(frozen=True, kw_only=True)
class DemoFound:
    """What the page shows.

    Attributes:
        results: of the distilled model, the freed one, and the original where it is here.
        freedom: of the freed one.
        examples: some of the training pictures.
        pictures: how many there were.
        losses: of each training step.
        seconds: of each part.
        commands: that do it all again.
        recipe: of the training, YAML.
    """

    results: Sequence[Result]
    freedom: Sequence[FreedomRow]
    examples: Sequence[Path]
    pictures: int
    losses: Sequence[float]
    seconds: Mapping[str, float]
    commands: Sequence[str]
    recipe: str


def write(out: Path, found: DemoFound) -> Path:
    """Write `out/index.html`, which is returned, and `out/grid.png`."""
    atomic_write_bytes(out / "grid.png", _grid(found.results))
    return write_page(
        found.results,
        out,
        freedom=found.freedom,
        labels=LABELS[: len(found.results)],
        title="A distilled model, set free",
        before=_before(found),
        after=_after(found),
    )


def _before(found: DemoFound) -> str:
    looks = "".join(image(path.read_bytes(), "a training picture") for path in found.examples)
    took = clock(found.seconds["preparing and training"])
    shown = f"{found.pictures} captioned pictures, {len(found.losses)} batches of them"
    return f"""<p><b>Here</b> a small FLUX with 13.4 M parameters was distilled, set free and measured:
“{LABELS[0]}” is <code>emoji-schnell</code>, made from <code>emoji-base</code> (“{LABELS[2]}”) to draw in four steps.
This computer then showed it {shown} in {took}, and trained an
adapter on the plain flow-matching objective: that is “{LABELS[1]}”. The training saw neither the original nor
anything that the original drew.</p>
<p><b>Read it with care.</b> Loss and slope are the cheapest measures to correct: the distilled model drawn at guidance
1/3, without any training, closes about three quarters of both gaps (<code>benchmarks/no_training.py</code>); in drawn
pictures that does not help. The held-out pictures are scenes that the original was trained on, moved by one or two
pixels.</p><p class="look">{looks}</p>"""


def _after(found: DemoFound) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{clock(took)}</td></tr>" for what, took in found.seconds.items()
    )
    return f"""<h2>Loss in training</h2>{loss_curve(found.losses)}
<h2>Time</h2><table>{rows}<tr><th>together</th><th>{clock(sum(found.seconds.values()))}</th></tr></table>
<h2>The same by hand</h2><pre>{html.escape(chr(10).join(found.commands))}</pre>
<h2>The recipe</h2><pre>{html.escape(found.recipe)}</pre>"""


def _grid(results: Sequence[Result]) -> bytes:
    """Rows of prompts and models; columns of guidance, then of steps."""
    kinds: dict[str, dict[str, tuple[Sequence[str], list[list[Image.Image]]]]] = {}
    for grid in grids(results):
        cells = [
            [Image.open(file, formats=["PNG"]).convert("RGB") for file in row if file is not None] for row in grid.rows
        ]
        kinds.setdefault(grid.what, {})[grid.prompt] = (grid.heads, cells)
    rows, labels, heads = list[list[Image.Image]](), list[str](), list[str]()
    guided, stepped, *_ = kinds.values()
    for prompt in [prompt for prompt in guided if prompt in stepped]:
        heads = [*guided[prompt][0], *stepped[prompt][0]]
        for label, left, right in zip(LABELS, guided[prompt][1], stepped[prompt][1], strict=False):
            rows.append([*left, *right])
            labels.append(f"{label}: {prompt}")
    held = io.BytesIO()
    sheet(rows, labels, heads).save(held, "PNG", optimize=True)
    return held.getvalue()


def loss_curve(losses: Sequence[float], width: int = 900, height: int = 260) -> str:
    """An SVG of the loss: each step as a dot, a running mean over 25 steps as a line."""
    if not losses:
        return "<p>no steps</p>"
    window = 25
    means = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0

    def point(step: int, value: float) -> tuple[float, float]:
        x = 60 + (width - 80) * step / max(1, len(losses) - 1)
        return x, 15 + (height - 50) * (1 - (value - low) / span)

    dots = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="1.5" fill="#c9b8a6"/>'.format(*point(i, v)) for i, v in enumerate(losses)
    )
    line = " ".join("{:.1f},{:.1f}".format(*point(i, v)) for i, v in enumerate(means))
    labels = "".join(
        f'<text x="52" y="{point(0, v)[1] + 4:.0f}" text-anchor="end" font-size="12">{v:.2f}</text>'
        for v in (low, high)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by step">{dots}'
        f'<polyline points="{line}" fill="none" stroke="#7a3b1d" stroke-width="2"/>{labels}'
        f'<text x="60" y="{height - 8}" font-size="12">step 1</text>'
        f'<text x="{width - 20}" y="{height - 8}" text-anchor="end" font-size="12">step {len(losses)}</text></svg>'
    )
