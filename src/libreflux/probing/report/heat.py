"""Heat maps as pictures inside a page: strips of many numbers, and a map that lies over a picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

RAMP = ((24, 24, 58), (72, 32, 110), (140, 41, 110), (205, 66, 71), (242, 127, 38), (252, 214, 92), (255, 255, 220))
"""Dark to bright at even steps: it is read in grey too, and on light and dark pages."""
NOTHING = (128, 128, 128)
"""Of what is exactly 0."""
LOW, HIGH = -5.0, 5.0
"""Of the scale: log2 of how many times an even share."""
LEFT, CELL_WIDTH, TOP = 70, 900, 18


def colour(times: float) -> tuple[int, int, int]:
    """The colour of a share that is so many times an even one; grey for nothing."""
    if times <= 0:
        return NOTHING
    place = (min(max(math.log2(times), LOW), HIGH) - LOW) / (HIGH - LOW) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(RAMP[index], RAMP[index + 1], strict=True))
    return red, green, blue


def css(rgb: Sequence[int]) -> str:
    """A colour as CSS has it."""
    return "#" + "".join(f"{value:02x}" for value in rgb)


def ink(rgb: Sequence[int]) -> str:
    """Black or white, whichever is read on this colour."""
    return "#000" if 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 120 else "#fff"


def strip(times: np.ndarray, rows: Sequence[str], *, title: str, across: str, wide: int = 0, mark: str = "") -> str:
    """Rows of numbers as colours, a figure.

    Args:
        times: [R, C], how many times an even share.
        rows: a label for each row; "" has none.
        title: of the figure.
        across: what the columns are.
        wide: how many columns at the start are drawn so wide that they have about a third of the width, or more.
        mark: what begins after them; "" marks nothing.
    """
    count, columns = times.shape
    tall = max(4, min(14, 320 // max(1, count)))
    whole = TOP + tall * count + 18
    labels, lines = _row_labels(rows, tall), ""
    if 0 < wide < columns:
        repeats = max(1, round((columns - wide) / (2 * wide)))
        x = LEFT + CELL_WIDTH * wide * repeats / (wide * repeats + columns - wide)
        times = np.concatenate([times[:, :wide].repeat(repeats, axis=1), times[:, wide:]], axis=1)
        if mark:
            lines = f'<path class="mark" d="M{x:.1f} {TOP - 4}V{TOP + tall * count + 3}"/>'
            lines += f'<text x="{x + 3:.1f}" y="{TOP - 6}">{escape(mark)}</text>'
    picture = (
        f'<image x="{LEFT}" y="{TOP}" width="{CELL_WIDTH}" height="{tall * count}" preserveAspectRatio="none" '
        f'href="{_png(_coloured(times))}"/>'
    )
    told = escape(title)
    ends = (
        f'<text x="{LEFT}" y="{whole - 4}">0</text><text x="{LEFT + CELL_WIDTH}" y="{whole - 4}" '
        f'text-anchor="end">{columns - 1}</text><text x="{LEFT + CELL_WIDTH / 2:.0f}" y="{whole - 4}" '
        f'text-anchor="middle">{escape(across)}</text>'
    )
    return (
        f'<figure class="strip"><figcaption>{told}</figcaption><svg viewBox="0 0 {LEFT + CELL_WIDTH + 10} {whole}" '
        f'role="img" aria-label="{told}">{picture}{lines}{labels}{ends}</svg></figure>'
    )


def scale() -> str:
    """What the colours mean."""
    stops = ", ".join(css(each) for each in RAMP)
    return (
        f'<p class="faint">Colours, in times an even share: 1/{2**-LOW:.0f}<span class="scale" '
        f'style="background: linear-gradient(90deg, {stops})"></span>{2**HIGH:.0f}, grey: exactly nothing.</p>'
    )


def over(where: np.ndarray, picture: str, alt: str) -> str:
    """A map over a picture: bright where much of the token is read, clear where little is.

    Args:
        where: [rows, columns], of the image's tokens; scaled to its own largest.
        picture: class of CSS whose background is the picture.
        alt: what it shows.
    """
    strength = where / max(float(where.max()), 1e-30)
    shown = np.zeros((*where.shape, 4), np.uint8)
    # Dark veil where it is not read, warm and half clear where it is: the picture stays visible.
    shown[..., 0] = np.round(255 * strength)
    shown[..., 1] = np.round(150 * strength**2)
    shown[..., 3] = np.round(205 - 75 * strength)
    data = Image.fromarray(shown, "RGBA")
    larger = data.resize((data.width * 4, data.height * 4), Image.Resampling.BICUBIC) if data.width < 40 else data
    return f'<div class="over map {picture}"><img alt="{escape(alt)}" src="{_png(larger)}"></div>'


def _row_labels(rows: Sequence[str], tall: int) -> str:
    every = max(1, math.ceil(12 / tall))
    return "".join(
        f'<text x="{LEFT - 5}" y="{TOP + tall * (index + 0.5) + 4:.1f}" text-anchor="end">{escape(row)}</text>'
        for index, row in enumerate(rows)
        if row and index % every == 0
    )


def _coloured(times: np.ndarray) -> Image.Image:
    pixels = np.array([[colour(float(value)) for value in row] for row in times], np.uint8)
    return Image.fromarray(pixels, "RGB")


def _png(image: Image.Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
