from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libreflux.data.order import Unit, step_plan, steps_per_epoch

counts = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def by_slot(units: list[Unit]) -> list[int]:
    """The samples of a step in slot order."""
    placed = {slot: item for unit in units for slot, item in zip(unit.slots, unit.items, strict=True)}
    assert sorted(placed) == list(range(units[0].total))
    return [placed[slot] for slot in range(units[0].total)]


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 60), counts, counts, counts, st.integers(0, 3))
def test_an_epoch_shows_every_sample_once(
    seed: int, samples: int, world: int, batch: int, accumulate: int, epoch: int
) -> None:
    steps = steps_per_epoch(samples, world, batch, accumulate)
    seen: list[int] = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        units = step_plan(seed, step, samples, world, batch, accumulate)
        assert {unit.epoch for unit in units} == {epoch}
        seen += by_slot(units)
    assert sorted(seen) == list(range(samples))


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 50), st.integers(1, 60))
def test_the_split_over_ranks_changes_nothing(seed: int, step: int, samples: int) -> None:
    whole = by_slot(step_plan(seed, step, samples, 1, 24, 1))
    for world, batch, accumulate in ((24, 1, 1), (2, 3, 4), (3, 8, 1), (1, 1, 24), (4, 2, 3)):
        assert by_slot(step_plan(seed, step, samples, world, batch, accumulate)) == whole


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 50), st.integers(1, 60), counts, counts, counts)
def test_units_are_weighted_by_their_samples(
    seed: int, step: int, samples: int, world: int, batch: int, accumulate: int
) -> None:
    units = step_plan(seed, step, samples, world, batch, accumulate)
    assert [(unit.micro, unit.rank) for unit in units] == [(m, r) for m in range(accumulate) for r in range(world)]
    assert sum(unit.weight for unit in units) == pytest.approx(1)
    for unit in units:
        assert len(unit.items) == len(unit.slots) <= batch
        first = (unit.micro * world + unit.rank) * batch
        assert unit.slots == tuple(range(first, first + batch))[: max(0, unit.total - first)]


def test_epochs_and_seeds_shuffle_differently() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return by_slot(step_plan(seed, number, 50, 1, 50, 1))

    assert len({tuple(epoch(seed, number)) for seed in range(5) for number in range(5)}) == 25


def test_every_order_is_equally_likely() -> None:
    orders = [tuple(by_slot(step_plan(seed, 0, 3, 1, 3, 1))) for seed in range(3000)]
    for order in set(orders):
        # 500 expected of each of the 6; five standard deviations are 102.
        assert abs(orders.count(order) - 500) < 102
    assert len(set(orders)) == 6


def test_a_step_needs_no_step_before_it() -> None:
    code = "from libreflux.data.order import step_plan; print(step_plan(3, 1234, 100, 2, 3, 4))"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert fresh.strip() == str(step_plan(3, 1234, 100, 2, 3, 4))


@pytest.mark.parametrize("arguments", [(0, -1, 4, 1, 1, 1), (0, 0, 0, 1, 1, 1), (0, 0, 4, 0, 1, 1)])
def test_impossible_plans_are_refused(arguments: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no plan"):
        step_plan(*arguments)
