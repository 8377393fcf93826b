"""A share of the way between two ends, all three measured on the same pictures, with its interval."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from libreflux.probing.freedom import NOISY
from libreflux.probing.metrics.measures import CONFIDENCE
from libreflux.probing.results import Measure

TOO_NOISY = "too noisy"
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
        adapted, start, end: the three values.
        left: whether the share that is left is asked for.
    """
    one, zero, far = (np.array([row.value, *row.replicates]) for row in (adapted, start, end))
    build = functools.partial(Share, by=by, adapted=adapted.value, start=start.value, end=end.value)
    whole = np.isfinite(one) & np.isfinite(zero) & np.isfinite(far)
    gap = (far - zero)[whole]
    if not whole[0] or whole.sum() < 3 or not _off_zero(gap):
        return build(value=math.nan, low=math.nan, high=math.nan, noisy=True)
    shares = (one - zero)[whole] / np.where(gap == 0, np.nan, gap)
    shares = 1 - shares if left else shares
    low, high = (float(each) for each in np.nanquantile(shares[1:], _TAILS))
    value = float(shares[0])
    noisy = low < 0 < high and high - low > NOISY
    return build(value=value, low=min(low, value), high=max(high, value), noisy=noisy)


def _off_zero(differences: np.ndarray) -> bool:
    """Whether the interval of [1 + R] differences leaves out 0."""
    low, high = np.quantile(differences[1:], _TAILS)
    return bool(low > 0 or high < 0)


def exactly(one: Share, value: float) -> Share:
    """The share that is known without counting: of a model that has not changed."""
    return dataclasses.replace(one, value=value, low=value, high=value, noisy=False)


def ordered(shares: Sequence[Share]) -> tuple[Share, ...]:
    """The lowest share first; what is too noisy comes last."""
    return tuple(sorted(shares, key=lambda one: (one.noisy, one.value if not one.noisy else 0.0)))
