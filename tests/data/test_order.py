from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libreflux.data.order import Samples, Unit, step_plan, steps_of_epoch

counts = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def alike(count: int) -> Samples:
    """One bucket, captions of one length."""
    return Samples(np.zeros(count, int), lambda items, visits: np.ones(len(items), int))


def lengths(items: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Another length in every visit."""
    return 5 + (items * 37 + visits * 11) % 97


@st.composite
def tables(draw: st.DrawFn, *, whole: bool = False) -> Samples:
    """Samples of a few buckets; unless ``whole``, of rates that are no whole numbers."""
    buckets = np.array(draw(st.lists(st.sampled_from([3, 7, 2**16 + 5]), min_size=1, max_size=60)))
    rate = st.integers(1, 3) if whole else st.floats(0.25, 2.5)
    rates = np.array(draw(st.lists(rate, min_size=len(buckets), max_size=len(buckets))), float)
    phases = (np.arange(len(buckets)) + 0.5) / len(buckets)
    return Samples(buckets, lengths, rates, phases)


def by_slot(units: list[Unit]) -> list[tuple[int, int]]:
    """(sample, visit) of a step in slot order."""
    placed: dict[int, tuple[int, int]] = {}
    for unit in units:
        placed |= zip(unit.slots, zip(unit.items, unit.visits, strict=True), strict=True)
    assert sorted(placed) == list(range(units[0].total))
    return [placed[slot] for slot in range(units[0].total)]


@settings(deadline=None, max_examples=40)
@given(seeds, tables(), counts, counts, counts)
def test_epochs_show_every_visit_once_and_each_unit_one_bucket(
    seed: int, samples: Samples, world: int, batch: int, accumulate: int
) -> None:
    step, seen = 0, []
    for epoch in range(5):
        steps = steps_of_epoch(epoch, samples, world, batch, accumulate)
        shown = []
        for _ in range(steps):
            units = step_plan(seed, step, samples, world, batch, accumulate)
            assert {unit.epoch for unit in units} == {epoch}
            assert all(len(unit.items) <= batch for unit in units)
            assert all(len(set(samples.buckets[list(unit.items)])) <= 1 for unit in units)
            shown += by_slot(units)
            step += 1
        assert sorted(shown) == sorted(zip(*map(np.ndarray.tolist, samples.shown(epoch)), strict=True))
        seen += shown
    assert len(set(seen)) == len(seen)
    for item, rate in enumerate(np.asarray(samples.rates).tolist()):
        visits = sorted(visit for sample, visit in seen if sample == item)
        assert visits == list(range(len(visits)))
        assert abs(len(visits) - 5 * rate) < 1  # no luck in it


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 50), tables(), counts)
def test_the_split_over_ranks_changes_nothing(seed: int, step: int, samples: Samples, batch: int) -> None:
    whole = step_plan(seed, step, samples, 1, batch, 12)
    for world, accumulate in ((12, 1), (2, 6), (3, 4), (4, 3)):
        units = step_plan(seed, step, samples, world, batch, accumulate)
        assert by_slot(units) == by_slot(whole)
        assert [unit.items for unit in units] == [unit.items for unit in whole]
        assert [(unit.micro, unit.rank) for unit in units] == [(m, r) for m in range(accumulate) for r in range(world)]
        assert sum(unit.weight for unit in units) == pytest.approx(1)


@settings(deadline=None, max_examples=20)
@given(seeds, tables(whole=True), counts, counts)
def test_short_units_are_as_few_as_the_buckets_allow(seed: int, samples: Samples, batch: int, accumulate: int) -> None:
    steps = steps_of_epoch(0, samples, 1, batch, accumulate)
    sizes: dict[int, list[int]] = {}
    for step in range(steps):
        for unit in step_plan(seed, step, samples, 1, batch, accumulate):
            if unit.items:
                sizes.setdefault(int(samples.buckets[unit.items[0]]), []).append(len(unit.items))
    assert all(sum(size < batch for size in of_bucket) <= 1 for of_bucket in sizes.values())


def test_units_hold_captions_of_one_length_or_nearly() -> None:
    """Log-normal lengths, as captions have them: grouped, a few hundredths are padding, at random nearly half."""
    random = np.random.default_rng(0)
    of_sample = np.clip(random.lognormal(4, 0.8, 4000), 3, 512).astype(int)
    samples = Samples(np.zeros(4000, int), lambda items, visits: of_sample[items])
    shuffled = random.permutation(of_sample).reshape(-1, 16)
    by_chance = 1 - of_sample.sum() / (shuffled.max(axis=1) * 16).sum()
    assert by_chance > 0.5
    padded = total = 0
    for step in range(steps_of_epoch(0, samples, 1, 16, 1)):
        [unit] = step_plan(0, step, samples, 1, 16, 1)
        padded += of_sample[list(unit.items)].max() * len(unit.items)
        total += of_sample[list(unit.items)].sum()
    assert 1 - total / padded < 0.12


def test_no_two_epochs_have_the_same_batches_and_lengths_come_in_any_order() -> None:
    of_sample = np.arange(100, 200)
    samples = Samples(np.zeros(100, int), lambda items, visits: of_sample[items])
    epochs = [[step_plan(0, epoch * 25 + step, samples, 1, 4, 1)[0].items for step in range(25)] for epoch in range(2)]
    assert len({frozenset(unit) for unit in epochs[0]} & {frozenset(unit) for unit in epochs[1]}) < 5
    means = [of_sample[list(unit)].mean() for unit in epochs[0]]
    assert abs(np.corrcoef(means, np.arange(25))[0, 1]) < 0.5


def test_every_order_is_equally_likely() -> None:
    three = alike(3)
    orders = [tuple(by_slot(step_plan(seed, 0, three, 1, 1, 3))) for seed in range(3000)]
    for order in set(orders):
        # 500 expected of each of the 6; five standard deviations are 102.
        assert abs(orders.count(order) - 500) < 102
    assert len(set(orders)) == 6


@pytest.mark.parametrize("rates", ["None", "np.linspace(0.3, 1.7, 100)"])
def test_a_step_needs_no_step_before_it(rates: str) -> None:
    code = f"""
import numpy as np
from libreflux.data.order import Samples, step_plan
samples = Samples(np.arange(100) % 3, lambda items, visits: 5 + (items * 37 + visits) % 97, {rates})
print(step_plan(3, 1234, samples, 2, 3, 4))"""
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    known = {"np": np}
    table = Samples(np.arange(100) % 3, lambda items, visits: 5 + (items * 37 + visits) % 97, eval(rates, known))
    for step in (7, 2000, 3):
        step_plan(3, step, table, 2, 3, 4)
    assert fresh.strip() == str(step_plan(3, 1234, table, 2, 3, 4))


@pytest.mark.parametrize("arguments", [(-1, 4, 1, 1, 1), (0, 0, 1, 1, 1), (0, 4, 0, 1, 1)])
def test_impossible_plans_are_refused(arguments: tuple[int, int, int, int, int]) -> None:
    step, count, *split = arguments
    with pytest.raises(ValueError, match="no plan"):
        step_plan(0, step, alike(count), *split)


@pytest.mark.parametrize("rate", [1e-6, 3e-4, 0.3, 0.999])
def test_epochs_that_show_nothing_are_passed_over_at_once(rate: float) -> None:
    samples = Samples(np.zeros(1, int), lengths, np.array([rate]), np.array([0.5]))
    first = samples.next_shown(0)
    assert [len(samples.shown(epoch)[0]) for epoch in (first - 1, first) if epoch >= 0][-1] == 1
    assert first == 0 or len(samples.shown(first - 1)[0]) == 0
    assert steps_of_epoch(first, samples, 1, 1, 1) == 1
    epochs = [step_plan(0, step, samples, 1, 1, 1)[0] for step in range(5)]
    assert [unit.visits for unit in epochs] == [(visit,) for visit in range(5)]
    assert [unit.epoch for unit in epochs] == pytest.approx([(visit + 0.5) / rate for visit in range(5)], abs=1.01)


@settings(deadline=None, max_examples=40)
@given(tables(), st.integers(0, 50))
def test_the_next_epoch_that_shows_anything_is_the_next_one(samples: Samples, epoch: int) -> None:
    expected = next(each for each in range(epoch, epoch + 100) if len(samples.shown(each)[0]))
    assert samples.next_shown(epoch) == expected
