"""What is found of a contender, and how contenders compare: by rounds, not by medians."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Measured:
    """What was found of one contender.

    Attributes:
        seconds: by round; rounds of one name are of the same turn.
        parts: seconds of named parts of the work, by round.
        peak_bytes: that it held and needed at most; None where that cannot be told.
        operations: dispatched in one run; None: not counted.
        reason: why there is no figure; None: there is one.
    """

    name: str
    ours: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    operations: int | None = None
    reason: str | None = None


def ratio(of: Mapping[str, float], to: Mapping[str, float]) -> float | None:
    """The median over the rounds that both have of `of`'s seconds over `to`'s; None without such a round."""
    shared = [name for name in of if name in to]
    return statistics.median(of[name] / to[name] for name in shared) if shared else None


def ratio_through(of: Measured, to: Measured, others: Sequence[Measured]) -> float | None:
    """`ratio`; of two that were never in one group, the product of the ratios through one that was with both."""
    direct = ratio(of.seconds, to.seconds)
    if direct is not None:
        return direct
    for between in others:
        first, second = ratio(of.seconds, between.seconds), ratio(between.seconds, to.seconds)
        if first is not None and second is not None:
            return first * second
    return None
