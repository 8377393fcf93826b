"""Intervals of shares and of distances, and what a measure keeps of each picture."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from libreflux import seeding
from libreflux.probing.freedom import TOO_NOISY, closed, freedom
from libreflux.probing.metrics.bootstrap import (
    REPLICATES,
    PairMean,
    mean,
    measured,
    other_side,
    ratio,
    root_ratio,
    share,
    shared_seeds,
)
from libreflux.probing.metrics.distances import (
    frechet_distance,
    frechet_replicates,
    kernel_distance,
    kernel_replicates,
)
from libreflux.probing.metrics.wilson import wilson
from libreflux.probing.report import few
from libreflux.probing.results import Measure, Result
from libreflux.probing.units import Units


def everyone(count: int) -> dict[str, np.ndarray]:
    return {"all": np.arange(count)}


@pytest.mark.parametrize(("yes", "asked"), [(24, 24), (0, 7), (3, 10), (180, 192)])
def test_the_interval_of_a_share_is_wilsons(yes: int, asked: int) -> None:
    theirs = scipy.stats.binomtest(yes, asked).proportion_ci(method="wilson")
    assert wilson(yes, asked) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_all_of_24_right_is_not_sure_to_be_all() -> None:
    right = np.ones(30)
    right[24:] = np.nan  # not asked
    [row] = measured("accuracy", {}, share(right), 30, everyone(30), seed=0)
    assert (row.value, row.count) == (1, 24)
    assert (row.low, row.high) == pytest.approx((0.862, 1), abs=1e-3)
    [clipped] = measured("clipped", {}, mean(right), 30, everyone(30), seed=0)
    assert (clipped.low, clipped.high) == (1, 1)


def test_a_measure_can_be_counted_anew_from_what_it_keeps() -> None:
    random = seeding.rng(0, "units")
    above, below = random.random(20), random.random(20) + 0.1
    for statistic in (ratio(above, below), root_ratio(above, below), mean(above)):
        [row] = measured("m", {}, statistic, 20, everyone(20), seed=0, over="pictures")
        again = Measure.from_json(json.loads(json.dumps(row.as_json(), allow_nan=False)))
        assert again == row
        assert again.units is not None
        top, bottom = again.units.arrays()
        value = top.sum() / bottom.sum()
        assert (value**0.5 if again.units.root else value) == pytest.approx(row.value, rel=1e-7)
        assert len(again.units.values()) == 20
    unasked = mean(np.array([1.0, math.nan, 3.0]))
    assert np.isnan(unasked.units("prompts").values()[1])
    broken = Units("prompts", [1.0, math.inf])
    assert math.isnan(Units.from_json(json.loads(json.dumps(broken.as_json(), allow_nan=False))).above[1])
    with pytest.raises(ValueError, match="no units"):
        Units.from_json({"over": "models", "above": []})


def test_real_pictures_are_resampled_too_and_apart_from_the_drawn_ones() -> None:
    random = torch.Generator().manual_seed(0)
    drawn, real = torch.randn(40, 5, generator=random), torch.randn(40, 5, generator=random) + 0.5
    others = other_side(40, seed=0)
    for replicates, distance in ((frechet_replicates, frechet_distance), (kernel_replicates, kernel_distance)):
        [one] = measured("d", {}, lambda w, r=replicates: r(drawn, real, w), 40, everyone(40), seed=0)  # type: ignore[misc]
        [two] = measured("d", {}, lambda w, r=replicates: r(drawn, real, w, others), 40, everyone(40), seed=0)  # type: ignore[misc]
        assert one.value == pytest.approx(distance(drawn, real), rel=1e-6)
        assert two.value == pytest.approx(one.value, rel=1e-6)
        assert two.high - two.low > 1.1 * (one.high - one.low)
        picked = np.repeat(np.arange(40), np.round(40 * others[3]).astype(int))
        if distance is frechet_distance:
            by_hand = frechet_replicates(drawn, real, np.full((4, 40), 1 / 40), others[:4])[3]
            mean_gap = (drawn.mean(0) - real[picked].mean(0)).square().sum()
            assert by_hand > float(mean_gap) * 0.99
    assert others.shape == (REPLICATES + 1, 40)


def test_seeds_that_all_prompts_share_are_resampled_too() -> None:
    random = seeding.rng(0, "seeds")
    prompts, seeds, truth, inside = 20, 4, 2.0, [0, 0]
    for trial in range(60):
        # A distance that depends on the two seeds far more than on the prompt: prompts alone say too little.
        own = random.standard_normal((seeds, seeds))
        shared = (own + own.T) / 2**0.5
        noise = 0.1 * random.standard_normal((prompts, seeds, seeds))
        pairs = (truth + shared + (noise + noise.transpose(0, 2, 1)) / 2) * (1 - np.eye(seeds))
        both = PairMean(pairs, shared_seeds(seeds, seed=trial))
        [wide] = measured("d", {}, both, prompts, everyone(prompts), seed=trial)
        [narrow] = measured("d", {}, mean(both.units("prompts").values()), prompts, everyone(prompts), seed=trial)
        assert wide.value == pytest.approx(narrow.value)
        assert wide.count == prompts
        for number, one in enumerate((wide, narrow)):
            inside[number] += one.low <= truth <= one.high
    assert inside[0] > 40
    assert inside[1] < 15


def sides(left: float, gap: float, spread: float) -> list[np.ndarray]:
    random = seeding.rng(0, "sides")
    means = (left, gap, 0.0)
    return [np.array([[m, *(m + spread * random.standard_normal(200))]]) for m in means]


def test_an_upper_end_that_is_a_rules_is_said_to_be() -> None:
    near, far = closed(*sides(0.05, 2.0, 0.1)), closed(*sides(1.0, 2.0, 0.1))
    assert near is not None
    assert far is not None
    assert near.high == 1 > near.high_replicates
    assert far.high == far.high_replicates


def result(name: str, level: float, spread: float, count: int) -> Result:
    random = seeding.rng(0, name)
    values = level + spread * random.standard_normal(200)
    one = Measure(
        name="diversity",
        at={},
        subset="all",
        value=level,
        low=float(values.min()),
        high=float(values.max()),
        replicates=values.tolist(),
        count=count,
    )
    return Result(model={"name": name}, settings={}, versions={}, seconds=1, measures=[one])


def test_a_share_that_could_be_anything_is_no_number() -> None:
    [row] = freedom(result("f", 0.8, 0.6, 12), result("d", 1.0, 0.35, 12), result("b", 0.0, 0.2, 40))
    assert row.verdict == row.text == row.brief == TOO_NOISY
    assert row.as_json()["low"] < 0
    assert row.count == 12
    [clear] = freedom(result("f", 0.05, 0.05, 40), result("d", 1.0, 0.05, 40), result("b", 0.0, 0.05, 40))
    assert clear.text.startswith("95 % [")
    assert clear.text.endswith(", 100*]")
    assert clear.as_json()["snapped"] is True
    assert clear.as_json()["high_replicates"] < 1


def test_few_are_warned_of() -> None:
    assert "n = 12 diversity" in few.warning([result("f", 1, 1, 12)])
    assert few.warning([result("f", 1, 1, 30)]) == ""
    assert "200 bootstrap replicates" in few.statement([result("f", 1, 1, 30)])
