"""Step number → samples: a pure function of (seed, step).

An epoch is one keyed permutation of all samples, cut into steps of world × batch × accumulate; its last step is short
when they do not divide. Nothing is dropped or repeated within an epoch. The samples of a step, and the slot (so the
noise level) of each, depend on the step's size alone, not on how it is split over ranks, batches and accumulation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from libreflux import keyed


@dataclass(frozen=True)
class Unit:
    """What one rank computes in one forward pass.

    Attributes:
        step: from 0.
        epoch: from 0; a step never spans two.
        micro: which of the step's accumulated passes.
        rank: whose.
        items: sample numbers in [0, sample_count); shorter than the batch, or empty, at an epoch's end.
        slots: each item's slot in the step, in [0, total): the stratum permutation and the noise are indexed by it.
        total: samples of the whole step over all ranks and passes.
    """

    step: int
    epoch: int
    micro: int
    rank: int
    items: tuple[int, ...]
    slots: tuple[int, ...]
    total: int

    @property
    def weight(self) -> float:
        """This unit's share of the step: mean losses weighted by it add up to the step's mean."""
        return len(self.items) / self.total


def steps_per_epoch(sample_count: int, world: int, batch: int, accumulate: int) -> int:
    """Number of steps, the short one included, in which every sample is seen once."""
    return -(-sample_count // (world * batch * accumulate))


def step_plan(seed: int, step: int, sample_count: int, world: int, batch: int, accumulate: int) -> list[Unit]:
    """The units of ``step``, accumulate × world of them, ordered by (micro, rank).

    Slot (micro × world + rank) × batch + index holds sample number ``slot`` of the step. Units at the end of a short
    step are short or empty; their ``weight`` says so.

    Raises:
        ValueError: a count below 1 or a negative step.
    """
    if min(sample_count, world, batch, accumulate) < 1 or step < 0:
        raise ValueError(f"no plan for step {step} of {sample_count} samples in {world} x {batch} x {accumulate}")
    epoch, position = divmod(step, steps_per_epoch(sample_count, world, batch, accumulate))
    size = world * batch * accumulate
    items = _permutation(seed, epoch, sample_count)[position * size : (position + 1) * size]
    total = len(items)
    units = []
    for micro in range(accumulate):
        for rank in range(world):
            first = min((micro * world + rank) * batch, total)
            slots = tuple(range(first, min(first + batch, total)))
            units.append(Unit(step, epoch, micro, rank, tuple(int(items[slot]) for slot in slots), slots, total))
    return units


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, sample_count: int) -> np.ndarray:
    order = keyed.rng(seed, "order", epoch).permutation(sample_count)
    order.setflags(write=False)
    return order
