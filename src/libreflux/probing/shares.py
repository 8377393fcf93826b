"""A share of the way between two ends, all three measured on the same pictures, with its interval.

A bootstrap of few units is too narrow (Efron & Tibshirani 1993, ch. 13): its ends are moved out as far as Student's t
is wider than a normal. Where an adapter got the same prompts right as the distilled model, a bootstrap is certain of
it: there the score interval of two paired shares says how far they may differ (Newcombe 1998, Stat. Med. 17, p. 2635,
method 10).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from libreflux.probing.freedom import NOISY
from libreflux.probing.metrics.measures import CONFIDENCE
from libreflux.probing.metrics.student import quantile
from libreflux.probing.metrics.wilson import wilson
from libreflux.probing.results import Measure

TOO_NOISY = "too noisy"
WIDE = 1.0
"""An interval that is wider than the whole way says little: such a share leads only where no other is narrower."""
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which share of the way from one end to the other has been gone, or is left, by one measure.

    Attributes:
        by: the measure.
        adapted, start, end: its values: under the adapter, where the way begins, and where it ends.
        value, low, high: the share with its 95 % interval; NaN where it is too noisy.
        noisy: the interval of end − start touches 0, or that of the share is wider than 200 points with 0 within.
    """

    by: str
    adapted: float
    start: float
    end: float
    value: float
    low: float
    high: float
    noisy: bool = False

    @property
    def wide(self) -> bool:
        """Whether the interval is wider than `WIDE`, and not outside of the way."""
        return self.high - self.low > WIDE and self.low < 1 and self.high > 0

    @property
    def text(self) -> str:
        """As "93 % [90, 96]", or "too noisy"."""
        if self.noisy:
            return TOO_NOISY
        value, low, high = (round(100 * one) for one in (self.value, self.low, self.high))
        return f"{value} % [{low}, {high}]"

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        return {
            key: None if isinstance(each, float) and not math.isfinite(each) else each
            for key, each in vars(self).items()
        }


def share_of_way(by: str, adapted: Measure, start: Measure, end: Measure, *, left: bool = False) -> Share:
    """(adapted − start) / (end − start), or what is left of it: one minus that. Replicates are paired.

    Args:
        by: what the measures are.
        adapted, start, end: the three values. Those that count what is right keep the numbers of their units.
        left: whether the share that is left is asked for.
    """
    one, zero, far = (np.array([row.value, *row.replicates]) for row in (adapted, start, end))
    build = functools.partial(Share, by=by, adapted=adapted.value, start=start.value, end=end.value)
    whole = np.isfinite(one) & np.isfinite(zero) & np.isfinite(far)
    gap = (far - zero)[whole]
    if not whole[0] or whole.sum() < 3 or not _off_zero(gap):
        return build(value=math.nan, low=math.nan, high=math.nan, noisy=True)
    gone = (one - zero)[whole] / np.where(gap == 0, np.nan, gap)
    value = float(gone[0])
    low, high = (float(each) for each in np.nanquantile(gone[1:], _TAILS))
    low, high = (value + _stretch(adapted.count) * (each - value) for each in (low, high))
    if adapted.unit == YES_OR_NO:
        reach = [each / float(gap[0]) for each in _paired(adapted, start)]
        low, high = min(low, *reach), max(high, *reach)
    value, low, high = (1 - value, 1 - high, 1 - low) if left else (value, low, high)
    noisy = low < 0 < high and high - low > NOISY
    return build(value=value, low=min(low, value), high=max(high, value), noisy=noisy)


YES_OR_NO = "share"
"""The unit of a measure that counts pictures which are right."""


def _stretch(count: int | None) -> float:
    """By how much Student's t of this many units is wider than the normal, and the spread larger than a resample's."""
    if count is None or count < 2:
        return 1.0
    return quantile(1 - CONFIDENCE, count - 1) * math.sqrt(count / (count - 1)) / NormalDist().inv_cdf(_TAILS[1])


def _paired(one: Measure, other: Measure) -> tuple[float, float]:
    """The score interval of the difference of two shares of the same units (Newcombe 1998, method 10)."""
    assert one.units is not None
    assert other.units is not None
    (yes, asked), (too, _) = one.units.arrays(), other.units.arrays()
    yes, too = yes[asked > 0], too[asked > 0]
    count = len(yes)
    p, q = float(yes.mean()), float(too.mean())
    product = p * q * (1 - p) * (1 - q)
    phi = (float((yes * too).mean()) - p * q) / math.sqrt(product) if product > 0 else 0.0
    (p_low, p_high), (q_low, q_high) = (wilson(count * each, count) for each in (p, q))

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def _off_zero(differences: np.ndarray) -> bool:
    """Whether the interval of [1 + R] differences leaves out 0."""
    low, high = np.quantile(differences[1:], _TAILS)
    return bool(low > 0 or high < 0)


def exactly(one: Share, value: float) -> Share:
    """The share that is known without counting: of a model that has not changed."""
    return dataclasses.replace(one, value=value, low=value, high=value, noisy=False)


def ordered(shares: Sequence[Share]) -> tuple[Share, ...]:
    """The lowest share first; those that are `wide` come after the others, and the too noisy ones last.

    The lowest of several is low by chance too: where all are alike, each of them may be the first. So the upper end of
    the first is moved out until, of all that could have been the first, 2.5 % end below the true one (Bonferroni). Its
    lower end needs nothing: it is lower than it would be without the choice.
    """
    found = sorted(shares, key=lambda one: (one.noisy, one.wide, one.value if not one.noisy else 0.0))
    if found and not found[0].noisy:
        first = found[0]
        among = sum(one.wide == first.wide and not one.noisy for one in found)
        normal = NormalDist()
        further = normal.inv_cdf(1 - _TAILS[0] / among) / normal.inv_cdf(_TAILS[1])
        found[0] = dataclasses.replace(first, high=first.value + further * (first.high - first.value))
    return tuple(found)
