"""Step number → samples: a pure function of (seed, step) and of each sample's bucket, rate and caption length.

In an epoch each sample is visited as often as its rate says. The visits of one bucket are grouped by the length of
their caption, cut into units of `batch` (the last of a bucket may be short), the units of all buckets are shuffled,
and a step is the next world × accumulate units. Nothing is dropped, nothing comes twice. What a step holds, and the
slot (so the noise level) of each sample, depends on the product world × accumulate alone, not on how it is split.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from libreflux import seeding

JITTER = 0.2  # lengths are grouped to within this share of themselves, so that no two epochs have the same batches


@dataclass(frozen=True, eq=False)
class Samples:
    """What the order knows of N samples.

    Attributes:
        buckets: [N] integers; a unit holds samples of one bucket.
        lengths: (samples [n], visits [n]) → [n] tokens of the caption that each visit reads, before dropout.
        rates: [N] visits per epoch, above zero; None: one each. In epoch e sample j is visited
            ⌊(e + 1)·rate + phase⌋ − ⌊e·rate + phase⌋ times: a rate of 0.5 is every second epoch, never left to luck.
        phases: [N] in [0, 1): which epochs a fractional rate falls into; None: 0.
    """

    buckets: np.ndarray
    lengths: Callable[[np.ndarray, np.ndarray], np.ndarray]
    rates: np.ndarray | None = None
    phases: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.buckets)

    def same_every_epoch(self) -> bool:
        """Whether every rate is a whole number."""
        return self.rates is None or bool((self.rates == np.floor(self.rates)).all())

    def shown(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples [n], visits [n]) of an epoch; a visit's number counts all visits to its sample since epoch 0."""
        if self.rates is None:
            return np.arange(len(self)), np.full(len(self), epoch)
        phases = 0.0 if self.phases is None else self.phases
        first = np.floor(epoch * self.rates + phases).astype(np.int64)
        times = np.floor((epoch + 1) * self.rates + phases).astype(np.int64) - first
        samples = np.repeat(np.arange(len(self)), times)
        nth = np.arange(len(samples)) - np.repeat(np.cumsum(times) - times, times)
        return samples, first[samples] + nth

    def next_shown(self, epoch: int) -> int:
        """The first epoch from `epoch` on in which any sample is visited."""
        if self.rates is None:
            return epoch
        phases = 0.0 if self.phases is None else self.phases
        visited = np.floor(epoch * self.rates + phases)
        # The epoch that takes a sample past its next whole number; one early where rounding lifts it: see the loop.
        found = int(max(epoch, np.floor((visited + 1 - phases) / self.rates).min() - 1))
        while not len(self.shown(found)[0]):
            found += 1
        return found


@dataclass(frozen=True)
class Unit:
    """What one rank computes in one forward pass.

    Attributes:
        step: from 0.
        epoch: from 0; a step never spans two.
        micro: which of the step's accumulated passes.
        rank: whose.
        items: sample numbers in [0, N), of one bucket; fewer than the batch, or none, at an epoch's or bucket's end.
        visits: which visit to its sample each one is, from 0.
        slots: each item's slot in the step, in [0, total): the stratum permutation and the noise are indexed by it.
        total: samples of the whole step over all ranks and passes.
    """

    step: int
    epoch: int
    micro: int
    rank: int
    items: tuple[int, ...]
    visits: tuple[int, ...]
    slots: tuple[int, ...]
    total: int

    @property
    def weight(self) -> float:
        """This unit's share of the step: mean losses weighted by it add up to the step's mean."""
        return len(self.items) / self.total


def step_plan(seed: int, step: int, samples: Samples, world: int, batch: int, accumulate: int) -> list[Unit]:
    """The units of ``step``, accumulate × world of them, ordered by (micro, rank), as are their slots.

    At an epoch's end units may be empty.

    Raises:
        ValueError: a count below 1 or a negative step.
    """
    if min(len(samples), world, batch, accumulate) < 1 or step < 0:
        raise ValueError(f"no plan for step {step} of {len(samples)} samples in {world} x {batch} x {accumulate}")
    size = world * accumulate
    epoch, position = _locate(samples, step, batch, size)
    plan = epoch_plan(seed, epoch, samples, batch)
    taken = [plan.unit(number) for number in range(position * size, min((position + 1) * size, len(plan)))]
    total = sum(len(items) for items, _ in taken)
    units, slot = [], 0
    for index in range(size):
        items, visits = taken[index] if index < len(taken) else ((), ())
        slots = tuple(range(slot, slot + len(items)))
        slot += len(items)
        units.append(Unit(step, epoch, index // world, index % world, items, visits, slots, total))
    return units


def steps_of_epoch(epoch: int, samples: Samples, world: int, batch: int, accumulate: int) -> int:
    """Number of steps of an epoch, the short one at its end included; the same for all when every rate is whole."""
    return -(-_unit_count(samples, epoch, batch) // (world * accumulate))


@dataclass(frozen=True)
class EpochPlan:
    """Visits grouped by unit; unit k is rows bounds[where[k]] to bounds[where[k] + 1]."""

    items: np.ndarray
    visits: np.ndarray
    bounds: np.ndarray
    where: np.ndarray

    def __len__(self) -> int:
        return len(self.where)

    def unit(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = slice(*self.bounds[self.where[number] :][:2])
        return tuple(self.items[rows].tolist()), tuple(self.visits[rows].tolist())


@functools.lru_cache(maxsize=2)
def epoch_plan(seed: int, epoch: int, samples: Samples, batch: int) -> EpochPlan:
    """All units of an epoch, in the order in which they are shown."""
    random = seeding.rng(seed, "order", epoch)
    items, visits = samples.shown(epoch)
    buckets = samples.buckets[items]
    wanted = samples.lengths(items, visits) * (1 + JITTER * (random.random(len(items)) - 0.5))
    order = np.lexsort((wanted, buckets))
    edges = np.flatnonzero(np.diff(buckets[order], prepend=np.nan, append=np.nan))
    # The short unit of a bucket lies anywhere among its lengths: at the end it would always be the longest captions.
    cuts = [_cut(first, end, batch, random) for first, end in itertools.pairwise(edges.tolist())]
    bounds = np.concatenate([*cuts, edges[-1:]])
    return EpochPlan(items[order], visits[order], bounds, random.permutation(len(bounds) - 1))


def _cut(first: int, end: int, batch: int, random: np.random.Generator) -> np.ndarray:
    """Starts of the units of rows [first, end)."""
    count = -(-(end - first) // batch)
    starts = first + batch * np.arange(count)
    missing = count * batch - (end - first)
    starts[random.integers(count) + 1 :] -= missing
    return starts


def _unit_count(samples: Samples, epoch: int, batch: int) -> int:
    counts = np.unique(samples.buckets[samples.shown(epoch)[0]], return_counts=True)[1]
    return int((-(-counts // batch)).sum())


def _locate(samples: Samples, step: int, batch: int, size: int) -> tuple[int, int]:
    """(epoch, step within it)."""
    epochs, ends = _epoch_ends(samples, batch, size)
    if samples.same_every_epoch():
        return divmod(step, ends[0])
    while ends[-1] <= step:
        epochs.append(samples.next_shown(epochs[-1] + 1))
        ends.append(ends[-1] - (-_unit_count(samples, epochs[-1], batch) // size))
    place = bisect_right(ends, step)
    return epochs[place], step - (ends[place - 1] if place else 0)


@functools.lru_cache(maxsize=4)
def _epoch_ends(samples: Samples, batch: int, size: int) -> tuple[list[int], list[int]]:
    """Epochs in which anything is shown, and the steps up to the end of each, so far; the caller lets them grow."""
    epoch = samples.next_shown(0)
    return [epoch], [-(-_unit_count(samples, epoch, batch) // size)]
