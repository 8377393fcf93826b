"""Statistics over units (pictures or prompts) to measures with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from libreflux.probing.metrics.measures import CONFIDENCE, resampled
from libreflux.probing.results import Coordinate, Measure

REPLICATES = 200
Statistic = Callable[[np.ndarray], np.ndarray]
"""statistic(weights [R, N], rows that sum to 1) → values [R]."""
Groups = Mapping[str, np.ndarray]
"""Subset to the numbers of its units in [0, N)."""


def measured(
    name: str,
    at: Mapping[str, Coordinate],
    statistic: Statistic,
    units: int,
    groups: Groups,
    *,
    seed: int,
    unit: str = "",
    reference: float | None = None,
    centred: bool = False,
) -> list[Measure]:
    """One measure for each subset of two units or more.

    Args:
        statistic: of the weights of all N units; those outside the subset weigh nothing.
        units: N.
        groups: the subsets.
        seed: of the resampling, which depends on it and on the subset's size alone.
        centred: move the replicates so that their mean is the value: for a statistic that repeats of one unit in a
            resample push one way.
    """
    found = []
    for subset, members in groups.items():
        count = len(members)
        if count < 2:
            continue
        weights = np.zeros((REPLICATES + 1, units))
        weights[0, members] = 1 / count
        weights[1:, members] = resampled(count, replicates=REPLICATES, seed=seed)
        value, *rest = np.asarray(statistic(weights), np.float64)
        replicates = np.array(rest)
        if centred and np.isfinite(replicates).any():
            replicates = replicates + value - np.nanmean(replicates)
        low, high = _interval(replicates)
        found.append(
            Measure(
                name=name,
                at=at,
                subset=subset,
                value=float(value),
                low=low,
                high=high,
                replicates=replicates.tolist(),
                reference=reference,
                unit=unit,
            )
        )
    return found


def _interval(replicates: np.ndarray) -> tuple[float, float]:
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def mean(values: np.ndarray) -> Statistic:
    """The mean of [N] values; units that are NaN do not count."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0.0), known.astype(np.float64))


def ratio(above: np.ndarray, below: np.ndarray) -> Statistic:
    """The ratio of two [N] sums; NaN where the lower one is not above 0."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        top, bottom = weights @ above, weights @ below
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)

    return statistic


def root_ratio(above: np.ndarray, below: np.ndarray) -> Statistic:
    """The ratio of two norms, from [N] squares each."""
    squares = ratio(above, below)
    return lambda weights: np.sqrt(np.maximum(squares(weights), 0.0))
