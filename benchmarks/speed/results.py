"""What a part found: rows of contenders and single figures, as JSON and as text for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.ratios import Measured, ratio_through

HEAD = ("contender", "median", "from–to", "share of limit", "peak", "operations", "of it")


@dataclass
class Row:
    """Contenders that did the same work.

    Attributes:
        title: the work.
        references: contenders that the others are compared with, as far as they are there.
        flops: what the work needs; None: it has no products to speak of.
        measured: of each contender.
    """

    title: str
    references: Sequence[str]
    flops: float | None
    measured: Sequence[Measured]

    def as_json(self, limit: float | None) -> dict[str, Any]:
        """Plain values; `limit` is the machine's measured limit in bf16, in 10^12 operations a second."""
        seconds = None if self.flops is None or not limit else self.flops / limit / 1e12
        return {
            "title": self.title,
            "references": list(self.references),
            "tflop": None if self.flops is None else self.flops / 1e12,
            "limit_seconds": seconds,
            "contenders": [self._contender(one, seconds) for one in self.measured],
        }

    def _contender(self, one: Measured, limit: float | None) -> dict[str, Any]:
        if not one.seconds:
            return {"name": one.name, "ours": one.ours, "reason": one.reason or "not measured"}
        taken = list(one.seconds.values())
        median = statistics.median(taken)
        ratios = {
            other.name: found
            for other in self.measured
            if other.name in self.references
            and other is not one
            and (found := ratio_through(other, one, self.measured)) is not None
        }
        return {
            "name": one.name,
            "ours": one.ours,
            "median": median,
            "low": min(taken),
            "high": max(taken),
            "rounds": len(taken),
            "parts": _medians(one.parts.values()),
            "times_faster_than": ratios,
            "share_of_limit": None if limit is None else limit / median,
            "peak_bytes": one.peak_bytes,
            "operations": one.operations,
            "seconds": one.seconds,
        }


@dataclass(frozen=True)
class Figure:
    """A single figure of a part."""

    name: str
    value: float | None
    unit: str


@dataclass
class Found:
    """What one part found."""

    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    limits: Mapping[str, Any] | None = None


def _medians(rounds: Any) -> dict[str, float]:
    by_name: dict[str, list[float]] = {}
    for parts in rounds:
        for name, taken in parts.items():
            by_name.setdefault(name, []).append(taken)
    return {name: statistics.median(taken) for name, taken in by_name.items()}


def text(part: Mapping[str, Any]) -> str:
    """A part's JSON for a terminal."""
    blocks = []
    for row in part["rows"]:
        references = present(row)
        head = [*HEAD[:3], *(f"times as fast as {name}" for name in references), *HEAD[3:]]
        lines = [head, *(cells(one, references) for one in row["contenders"] if "median" in one)]
        missing = [f"{one['name']}: {one['reason']}" for one in row["contenders"] if "median" not in one]
        blocks.append("\n".join([row["title"], *aligned(lines), *missing]))
    if part["figures"]:
        lines = [[one["name"], number(one["value"]), one["unit"]] for one in part["figures"]]
        blocks.append("\n".join([part["part"], *aligned(lines)]))
    return "\n\n".join(blocks)


def present(row: Mapping[str, Any]) -> list[str]:
    """The references of a row that have figures."""
    measured = [one["name"] for one in row["contenders"] if "median" in one]
    return [name for name in row["references"] if name in measured]


def cells(one: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    """One contender's cells, in the order of `HEAD` with the references behind the spread."""
    share, peak = one["share_of_limit"], one["peak_bytes"]
    return [
        one["name"],
        duration(one["median"]),
        f"{duration(one['low'])}–{duration(one['high'])}" if one["rounds"] > 1 else "once",
        *(f"{one['times_faster_than'][name]:.2f}" if name in one["times_faster_than"] else "" for name in references),
        "" if share is None else f"{share:.0%}",
        "" if peak is None else f"{peak / 2**30:.2f} GiB" if peak >= 2**30 else f"{peak / 2**20:.0f} MiB",
        "" if one["operations"] is None else f"{one['operations']:,}",
        ", ".join(f"{name} {duration(taken)}" for name, taken in one["parts"].items()),
    ]


def duration(seconds: float) -> str:
    """Three digits: 16.2 s, 0.713 s, 7.13 ms."""
    if seconds >= 0.1:
        return f"{number(seconds)} s"
    return f"{number(1e3 * seconds)} ms"


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart; empty ones are left out."""
    kept = [column for column in range(len(lines[0])) if any(line[column] for line in lines[1:] or lines)]
    widths = [max(len(line[column]) for line in lines) for column in kept]
    return ["  ".join(f"{line[at]:<{wide}}" for at, wide in zip(kept, widths, strict=True)).rstrip() for line in lines]
