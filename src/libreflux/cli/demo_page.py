"""The page that `libreflux demo` ends with: one self-contained HTML file beside its grids."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from libreflux import __version__
from libreflux.cli.progress import clock
from libreflux.files import atomic_write_bytes, atomic_write_text
from libreflux.probe.html import document, image
from libreflux.sample.grid import sheet


def write(
    out: Path,
    *,
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    guidance: Sequence[float],
    examples: Sequence[Path],
    losses: Sequence[float],
    times: Mapping[str, float],
    commands: Sequence[str],
    recipe: str,
) -> Path:
    """Write `out/index.html`, `out/grid.png` and one grid per model.

    Args:
        before, after: rows of prompts, columns of guidance scales.
        losses: of each training step.
        times: seconds of each part.

    Returns:
        The page.
    """
    heads = [f"guidance {scale:g}" for scale in guidance]
    grids = {
        "grid.png": sheet(
            [[*left, *right] for left, right in zip(before, after, strict=True)],
            prompts,
            [f"before, {head}" for head in heads] + [f"after, {head}" for head in heads],
        ),
        "before.png": sheet(before, prompts, heads),
        "after.png": sheet(after, prompts, heads),
    }
    for name, grid in grids.items():
        atomic_write_bytes(out / name, _png(grid))
    rows = "".join(f"<tr><td>{html.escape(what)}</td><td>{clock(took)}</td></tr>" for what, took in times.items())
    looks = "".join(image(path.read_bytes(), "a training picture") for path in examples)
    page = f"""<h1>A small FLUX learns a new look</h1>
<p>The model <code>emoji-base</code> (13.4 M parameters, the architecture of FLUX.1) has only ever seen glossy emoji on
plain colours. It was shown {len(losses)} batches of pencil drawings, and only a LoKr adapter was trained: the
LibreFLUX recipe, on this computer. The captions name the subject and say "on white", never the pencil: the look itself
is what it learnt. The adapter was then merged into a new model.</p>
<h2>What it was shown</h2><p class="look">{looks}</p>
<h2>Before and after, without guidance (1) and with classifier-free guidance (3, 6)</h2>
{image(_png(grids["grid.png"]), "prompts by model and guidance")}
<p>Each row has one prompt and one seed, so left and right start from the same noise.</p>
<h2>Loss</h2>{loss_curve(losses)}
<h2>Time</h2><table>{rows}<tr><th>together</th><th>{clock(sum(times.values()))}</th></tr></table>
<h2>The same by hand</h2><pre>{html.escape(chr(10).join(commands))}</pre>
<h2>The recipe</h2><pre>{html.escape(recipe)}</pre>
<p>libreflux {__version__}</p>"""
    atomic_write_text(out / "index.html", document("libreflux demo", page))
    return out / "index.html"


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


def _png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    return held.getvalue()
