"""Intervals of shares on planted numbers: the true share lies within as often as they say, of few units too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest

from libreflux.probing.metrics.bootstrap import mean, measured, share
from libreflux.probing.results import Measure
from libreflux.probing.shares import YES_OR_NO, Share, ordered, share_of_way

Draw = Callable[[np.random.Generator, int], np.ndarray]


def measure(values: np.ndarray, *, counts: bool = False) -> Measure:
    everyone, unit = {"all": np.arange(len(values))}, YES_OR_NO if counts else ""
    [found] = measured("x", {}, (share if counts else mean)(values), len(values), everyone, seed=0, unit=unit)
    return found


def way(random: np.random.Generator, units: int, gone: float) -> Share:
    """What is left of a way from 0 to 10, of which `gone` has been gone, under noise of 1."""
    adapted, start, end = (measure(at + random.normal(size=units)) for at in (10 * gone, 0, 10))
    return share_of_way("x", adapted, start, end, left=True)


def covered(found: list[Share], true: float) -> float:
    return float(np.mean([one.low <= true <= one.high for one in found]))


@pytest.mark.parametrize("units", [5, 24])
def test_the_true_share_is_within_the_interval_of_few_units_as_often_as_it_says(units: int) -> None:
    random = np.random.default_rng(units)
    assert 0.91 <= covered([way(random, units, 0.3) for _ in range(200)], 0.7) <= 0.99


def test_a_distance_of_few_pictures_is_widened_too() -> None:
    random = np.random.default_rng(3)
    rows = [measure(at + random.normal(size=6)) for at in (3, 0, 10)]
    apart = [dataclasses.replace(one, units=None) for one in rows]  # what a distance is made of is no sum
    many = [dataclasses.replace(one, count=6000) for one in apart]
    (few, much) = (share_of_way("FD", each[0], each[1], each[2]) for each in (apart, many))
    assert few.value == much.value
    assert (few.high - few.value) / (much.high - much.value) == pytest.approx(2.571 / 1.96 * (6 / 5) ** 0.5, rel=1e-3)


def test_the_lowest_of_several_that_are_alike_still_has_the_true_one_within() -> None:
    random = np.random.default_rng(2)
    lowest = [ordered([way(random, 24, 0.1) for _ in range(5)])[0] for _ in range(100)]
    assert covered(lowest, 0.9) >= 0.93
    assert np.mean([one.value for one in lowest]) < 0.88  # what the upper end has to make good


def test_all_right_is_not_told_to_be_certain() -> None:
    right, wrong = np.ones(24), np.zeros(24)
    all_right, none = measure(right, counts=True), measure(wrong, counts=True)
    found = share_of_way("accuracy", all_right, all_right, none, left=True)
    assert found.value == 1
    assert found.low == pytest.approx(0.86, abs=0.01)
    assert found.high > 1
    nothing = share_of_way("accuracy", none, all_right, none, left=True)
    assert json.loads(json.dumps(nothing.as_json()))["by"] == "accuracy"
    assert nothing.low == nothing.value == 0  # it cannot get less than nothing right
    assert nothing.high == pytest.approx(0.2, abs=0.05)


def test_accuracy_near_the_distilled_one_has_the_true_share_within() -> None:
    random = np.random.default_rng(4)
    found = []
    for _ in range(150):
        luck = random.random(48)  # of the prompt: both models miss the same ones
        rows = [measure((luck < p).astype(float), counts=True) for p in (0.89, 0.95)]
        broken = measure((random.random(48) < 0.15).astype(float), counts=True)
        found.append(share_of_way("accuracy", rows[0], rows[1], broken, left=True))
    assert covered(found, 1 - 0.06 / 0.8) >= 0.93


def made(by: str, value: float, low: float, high: float, *, noisy: bool = False) -> Share:
    return Share(by=by, adapted=0, start=0, end=1, value=value, low=low, high=high, noisy=noisy)


def test_what_is_wider_than_the_whole_way_leads_only_where_nothing_is_narrower() -> None:
    wide, narrow = made("FD", 0.6, -0.1, 1.2), made("KD", 0.95, 0.9, 1.0)
    lost, noisy = made("sharpness", -3, -5, -1), made("accuracy", 0, 0, 0, noisy=True)
    assert [one.by for one in ordered([wide, noisy, narrow])] == ["KD", "FD", "accuracy"]
    assert [one.by for one in ordered([wide, noisy])] == ["FD", "accuracy"]
    assert ordered([wide, narrow, lost])[0].by == "sharpness"  # wide, and far past the end
    assert ordered([wide, narrow])[0].high == narrow.high  # nothing else could have led
