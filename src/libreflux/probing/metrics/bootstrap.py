"""Statistics over units (pictures or prompts) to measures with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from libreflux.probing.metrics.measures import CONFIDENCE, resampled
from libreflux.probing.metrics.wilson import wilson
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.units import Over, Units

REPLICATES = 200
Statistic = Callable[[np.ndarray], np.ndarray]
"""statistic(weights [R, N], rows that sum to 1) → values [R]."""
Groups = Mapping[str, np.ndarray]
"""Subset to the numbers of its units in [0, N)."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """Σ w above / Σ w below of N units, or its root: a `Statistic` that can tell what it is made of.

    Attributes:
        above, below: [N].
        root: take the root.
        counts: `above` is 1 for yes and 0 for no, and `below` 1 for what was asked.
    """

    above: np.ndarray
    below: np.ndarray
    root: bool = False
    counts: bool = False

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        top, bottom = weights @ self.above, weights @ self.below
        found: np.ndarray = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
        return np.sqrt(np.maximum(found, 0.0)) if self.root else found

    def interval(self, members: np.ndarray) -> tuple[float, float] | None:
        """Wilson's, of counts; None where a bootstrap has to say."""
        asked = float(self.below[members].sum())
        return wilson(float(self.above[members].sum()), asked) if self.counts and asked else None

    def units(self, over: Over) -> Units:
        """All N, to be kept."""
        return Units.of(over, self.above, self.below, root=self.root)


@dataclass(frozen=True, eq=False)
class PairMean:
    """The mean over N units and the pairs of S seeds that all units share: a `Statistic` that resamples both.

    A seed that a resample holds twice is not paired with itself, which would be no distance at all. Few seeds tell
    little of others: where they decide more than prompts do, the 95 % interval of 8 seeds holds in 94 of 100 cases,
    that of 5 in 90, of 3 in 68; two have one pair, and are not resampled at all.

    Attributes:
        pairs: [N, S, S] of each unit between two seeds, 0 on the diagonal.
        seeds: [1 + REPLICATES, S], see `shared_seeds`.
    """

    pairs: np.ndarray
    seeds: np.ndarray

    @property
    def below(self) -> np.ndarray:
        """[N]: every unit counts."""
        return np.ones(len(self.pairs))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        each = np.einsum("rs,nst,rt->rn", self.seeds, self.pairs, self.seeds, optimize=True)
        found: np.ndarray = (weights * each).sum(axis=1) / (1 - np.square(self.seeds).sum(axis=1))
        return found

    def interval(self, members: np.ndarray) -> tuple[float, float] | None:
        """None: the bootstrap says."""
        return None

    def units(self, over: Over) -> Units:
        """The mean over the seeds' pairs of each unit, to be kept."""
        seeds = self.pairs.shape[1]
        return Units.of(over, self.pairs.sum(axis=(1, 2)) / (seeds * (seeds - 1)), self.below, root=False)


def shared_seeds(count: int, *, seed: int) -> np.ndarray:
    """[1 + REPLICATES, count]: weights of seeds that all units share, resampled independently of the units.

    The first row weighs all alike. Resamples of one seed alone have no pair, and are drawn again.
    """
    drawn = resampled(count, replicates=8 * REPLICATES, seed=seed, purpose="bootstrap of the seeds")
    several = drawn[(drawn > 0).sum(axis=1) > 1][:REPLICATES]
    return np.vstack([np.full((1, count), 1 / count), several])


def other_side(count: int, *, seed: int) -> np.ndarray:
    """[1 + REPLICATES, count]: weights of what the units are compared with, resampled independently of them.

    The first row weighs all alike, as the first that `measured` gives a statistic.
    """
    rest = resampled(count, replicates=REPLICATES, seed=seed, purpose="bootstrap of the other side")
    return np.vstack([np.full((1, count), 1 / count), rest])


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
    over: Over = "prompts",
) -> list[Measure]:
    """One measure for each subset of two units or more.

    Args:
        statistic: of the weights of all N units; those outside the subset weigh nothing.
        units: N.
        groups: the subsets.
        seed: of the resampling, which depends on it and on the subset's size alone.
        centred: move the replicates so that their mean is the value: for a statistic that repeats of one unit in a
            resample push one way.
        over: what the units are.
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
        low, high = ends(replicates)
        made_of = statistic if isinstance(statistic, Ratio | PairMean) else None
        if made_of is not None:
            count = int((made_of.below[members] > 0).sum())
            low, high = made_of.interval(members) or (low, high)
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
                count=count,
                units=None if made_of is None or subset != "all" else made_of.units(over),
            )
        )
    return found


def ends(replicates: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of [R] replicates: quantiles of those that are finite; NaN where none is."""
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def mean(values: np.ndarray) -> Ratio:
    """The mean of [N] values; units that are NaN do not count."""
    known = np.isfinite(values)
    return Ratio(np.where(known, values, 0.0), known.astype(np.float64))


def share(values: np.ndarray) -> Ratio:
    """The mean of [N] values that are 1 for yes, 0 for no, NaN for not asked; its interval is Wilson's."""
    plain = mean(values)
    return Ratio(plain.above, plain.below, counts=True)


def ratio(above: np.ndarray, below: np.ndarray) -> Ratio:
    """The ratio of two [N] sums; NaN where the lower one is not above 0."""
    return Ratio(above, below)


def root_ratio(above: np.ndarray, below: np.ndarray) -> Ratio:
    """The ratio of two norms, from [N] squares each."""
    return Ratio(above, below, root=True)
