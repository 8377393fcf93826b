"""Lines with bands as inline SVG: no script, no font, no dependency; colours follow the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
"""One a series, with its colour: printed in grey they still differ."""


@dataclass(frozen=True)
class Series:
    """A line through points (x, y, low, high), x rising; points that are not finite are left out.

    Attributes:
        label: of the legend.
        number: which colour and dash, 0–4.
        hollow: values of x whose marker is hollow.
    """

    label: str
    number: int
    points: Sequence[tuple[float, float, float, float]]
    hollow: Sequence[float] = ()


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    level: float | None = None,
    border: float | None = None,
    percent: bool = False,
) -> str:
    """A figure; "" where no series has a point.

    Args:
        x, y: labels of the axes.
        level: y of a thin line across, for what theory says.
        border: x of a thin line from top to bottom, between what differs in kind.
        percent: y is a share, told in percent.
    """
    kept = [[point for point in one.points if all(map(math.isfinite, point))] for one in series]
    if not any(kept):
        return ""
    xs = [point[0] for points in kept for point in points]
    ys = [value for points in kept for point in points for value in point[1:]] + ([] if level is None else [level])
    ys += [0.0] if percent else []
    ys += [0.01] if percent and not any(ys) else []  # a share that is always 0 has an axis too
    across, up = _Axis.of(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis.of(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up, percent)]
    if level is not None:
        parts.append(f'<path class="level" d="M{LEFT} {up(level):.1f}H{WIDTH - RIGHT}"/>')
    if border is not None and across.low < border < across.high:
        parts.append(f'<path class="level" d="M{across(border):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for one, points in zip(series, kept, strict=True):
        parts.append(_series(one, points, across, up))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x)}</text>'
    )
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>'
    )
    told = html.escape(title)
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{told}</figcaption>{drawn}{legend(series)}</figure>"


def legend(series: Sequence[Series]) -> str:
    """Each series' line and name."""
    rows = "".join(
        f'<span><svg viewBox="0 0 30 10" class="key" aria-hidden="true"><path class="line s{one.number}" d="M1 5H29"'
        f' stroke-dasharray="{DASHES[one.number]}"/></svg>{html.escape(one.label)}</span>'
        for one in series
    )
    return f'<p class="legend">{rows}</p>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    @staticmethod
    def of(low: float, high: float, start: float, end: float) -> _Axis:
        """Round ticks, five or so, that take in both ends."""
        span = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-9)
        rough = span / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
        return _Axis(ticks[0], ticks[-1], ticks, start, end)


def _grid(across: _Axis, up: _Axis, percent: bool) -> str:
    parts = []
    for tick in up.ticks:
        told = f"{100 * tick:.4g} %" if percent else f"{tick:.4g}"
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{told}</text>')
    for tick in across.ticks:
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:.4g}</text>')
    return "".join(parts)


def _series(one: Series, points: Sequence[tuple[float, float, float, float]], across: _Axis, up: _Axis) -> str:
    if not points:
        return ""
    there = [f"{across(x):.1f} {up(high):.1f}" for x, _, _, high in points]
    back = [f"{across(x):.1f} {up(low):.1f}" for x, _, low, _ in reversed(points)]
    line = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y, _, _ in points)
    kinds = [f"s{one.number} hollow" if x in one.hollow else f"s{one.number}" for x, *_ in points]
    dots = "".join(
        f'<circle class="{kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>'
        for kind, (x, y, _, _) in zip(kinds, points, strict=True)
    )
    return (
        f'<path class="band s{one.number}" d="M{"L".join(there + back)}Z"/>'
        f'<path class="line s{one.number}" d="M{line}" stroke-dasharray="{DASHES[one.number]}"/>{dots}'
    )
