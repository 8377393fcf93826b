"""Several models on the same pictures: by how much they differ, with intervals that hold for all pairs at once.

All of them saw the same pictures under the same noise, so a resample of the pictures moves them together: the interval
of a difference is far narrower than those of the two values. The intervals are simultaneous (the bootstrap of the
largest studentised deviation, Westfall & Young 1993): that the best one was chosen by these very pictures does not
make them wrong, as it would of intervals that are made for one pair each. Of few pictures the spread is uncertain
itself, so their reach is that of Student's t; of fewer than `FEW` no bootstrap tells how the pairs hang together, and
each pair has its share of the 5 % (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from libreflux.probing.metrics.measures import CONFIDENCE, Moments, resampled
from libreflux.probing.metrics.student import quantile

Score = Callable[[Moments, np.ndarray], np.ndarray]
"""score(moments, weights [R, N]) → [R]; the lower, the better."""
FEW = 16
"""Of 8 pictures the bootstrap alone told eight equal models apart in half of 300 trials, of 12 in a third."""


@dataclass(frozen=True, eq=False)
class Paired:
    """C models by one score; all arrays are fp64.

    Attributes:
        value, low, high: [C] the score of each, and its own 95 % interval.
        difference: [C, C], of row and column: value of the row − value of the column.
        reach: [C, C], half the width of the difference's simultaneous 95 % interval.
        wins: [C], the share of resamples in which it is the best; ties count for the first.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    difference: np.ndarray
    reach: np.ndarray
    wins: np.ndarray

    @property
    def best(self) -> int:
        """The one with the lowest value, the first of equal ones."""
        return int(np.argmin(self.value))

    @property
    def apart(self) -> np.ndarray:
        """[C, C] bool: whether the two differ by more than the pictures' chance."""
        return np.abs(self.difference) > self.reach


def total_loss(found: Moments, weights: np.ndarray) -> np.ndarray:
    """[R], the mean over the noise levels of the mean squared error of the velocity."""
    mean: np.ndarray = (weights @ found.error).mean(axis=1)
    return mean


def slope_error(found: Moments, weights: np.ndarray) -> np.ndarray:
    """[R], the mean over the noise levels of |1 − k|, k the calibration slope of `measures.slope`."""
    above, below = weights @ found.cross, weights @ found.power
    slopes = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    mean: np.ndarray = np.abs(1 - slopes).mean(axis=1)
    return mean


def compare(models: Sequence[Moments], score: Score, *, seed: int = 0) -> Paired:
    """Compares models that were measured on the same pictures in the same order.

    Args:
        models: C of them, at least one, over two pictures or more.
        score: what is compared.
        seed: of the resampling.
    """
    count = len(models[0])
    weights = np.concatenate([np.full((1, count), 1 / count), resampled(count, seed=seed)])
    scores = np.stack([score(one, weights) for one in models], axis=1)
    value, replicates = scores[0], scores[1:]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=0)
    difference = value[:, None] - value[None]
    reach = _reach(replicates, difference, count)
    return Paired(value, low, high, difference, reach, _share(replicates.argmin(axis=1), len(models)))


def relative_loss(one: Moments, reference: Moments, *, seed: int = 0) -> np.ndarray:
    """[S, 3] fp64: by which share the loss differs at each noise level, and the ends of its pointwise 95 % interval."""
    count = len(one)
    weights = np.concatenate([np.full((1, count), 1 / count), resampled(count, seed=seed)])
    ratio = (weights @ one.error) / (weights @ reference.error) - 1
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratio[1:], [tail, 1 - tail], axis=0)
    return np.stack([ratio[0], low, high], axis=1)


def _reach(replicates: np.ndarray, difference: np.ndarray, count: int) -> np.ndarray:
    """[C, C] from [R, C]: the 95 % quantile over resamples of the largest |d* − d| / se, times each pair's se.

    The quantile of a normal's tail is taken to the same tail of Student's t of n − 1 degrees of freedom, n the count of
    pictures; se² is the resamples' variance · n / (n − 1).
    """
    models = replicates.shape[1]
    spread = np.zeros_like(difference)
    largest = np.zeros(len(replicates))
    for first in range(models):
        # [R, C]: the pairs of one row, so that R x C x C is not held
        each = replicates[:, first : first + 1] - replicates
        spread[first] = each.std(axis=0)
        away = np.abs(each - difference[first])
        ratio = np.divide(away, spread[first], out=np.zeros_like(away), where=spread[first] > 0)
        largest = np.maximum(largest, ratio.max(axis=1))
    pairs = max(1, models * (models - 1) // 2)
    few = count < FEW
    tail = (1 - CONFIDENCE) / pairs if few else 2 * NormalDist().cdf(-np.quantile(largest, CONFIDENCE))
    reach: np.ndarray = quantile(tail, count - 1) * np.sqrt(count / (count - 1)) * spread
    return reach


def _share(chosen: np.ndarray, models: int) -> np.ndarray:
    return np.bincount(chosen, minlength=models) / len(chosen)
