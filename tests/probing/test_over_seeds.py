"""Several trainings as one result: intervals that hold over trainings and pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from libreflux import seeding
from libreflux.errors import DataError
from libreflux.probing.freedom import freedom
from libreflux.probing.metrics.bootstrap import mean, measured, share
from libreflux.probing.over_seeds import over_seeds
from libreflux.probing.results import Result

PICTURES, TRAININGS = 60, 3


def result(name: str, values: np.ndarray, seed: int = 0) -> Result:
    rows = measured(
        "loss", {"sigma": 0.5, "text": "caption"}, mean(values), len(values), {"all": np.arange(len(values))}, seed=seed
    )
    return Result(model={"name": name}, settings={}, versions={}, seconds=1.0, measures=rows)


def trainings(trial: int, between: float) -> list[Result]:
    random = seeding.rng(trial, "trainings-test")
    pictures = 2 + 0.5 * random.standard_normal(PICTURES)
    return [
        result(f"run {number}", pictures + between * random.standard_normal() + 0.05 * random.standard_normal(PICTURES))
        for number in range(TRAININGS)
    ]


def test_the_interval_holds_where_trainings_differ_more_than_pictures_do() -> None:
    inside = [0, 0]
    for trial in range(60):
        runs = trainings(trial, 0.5)
        for number, one in enumerate((over_seeds(runs, seed=trial), runs[0])):
            [row] = one.measures
            inside[number] += row.low <= 2 <= row.high
    assert inside[0] >= 54  # a bootstrap of three trainings: 44
    assert inside[1] <= 30


def test_its_value_is_the_mean_and_equal_trainings_leave_the_pictures_interval() -> None:
    runs = trainings(1, 0.0)
    same = over_seeds([runs[0]] * 3)
    [row], [own] = same.measures, runs[0].measures
    assert (row.value, row.low, row.high) == pytest.approx((own.value, own.low, own.high))
    both = over_seeds(runs)
    assert both.measures[0].value == pytest.approx(np.mean([one.measures[0].value for one in runs]))
    assert both.model["name"] == "run 0, 3 trainings"
    assert over_seeds(runs[:1]) is runs[0]
    share, _ = freedom(both, result("d", np.full(PICTURES, 4.0)), result("b", np.full(PICTURES, 1.0)))
    assert share.verdict == "gap"
    assert share.low < share.share < share.high


def test_a_share_that_all_trainings_reach_keeps_wilsons_interval() -> None:
    rows = measured("accuracy", {}, share(np.ones(24)), 24, {"all": np.arange(24)}, seed=0)
    one = Result(model={"name": "run"}, settings={}, versions={}, seconds=1.0, measures=rows)
    [row] = over_seeds([one] * TRAININGS).measures
    assert (row.value, row.low, row.high) == pytest.approx((1, 0.862, 1), abs=1e-3)


def test_trainings_that_were_not_measured_alike_are_refused() -> None:
    one, other = (
        dataclasses.replace(run, settings={"pictures": 60 + n}) for n, run in enumerate(trainings(3, 0.0)[:2])
    )
    with pytest.raises(DataError, match="were measured with another pictures"):
        over_seeds([one, other])


def test_replicates_that_are_not_paired_are_refused() -> None:
    runs = trainings(2, 0.0)
    short = dataclasses.replace(runs[0].measures[0], replicates=runs[0].measures[0].replicates[:10])
    with pytest.raises(DataError, match="not paired"):
        over_seeds([runs[1], dataclasses.replace(runs[0], measures=[short])])
