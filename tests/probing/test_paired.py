"""Paired comparison: differences that are there are found, others are not, whoever is chosen as the best."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from libreflux.probing.metrics.measures import Moments, resampled
from libreflux.probing.metrics.paired import FEW, compare, relative_loss, slope_error, total_loss
from libreflux.probing.metrics.student import beyond, quantile

PICTURES = 60


def moments(error: np.ndarray, slope: float = 1.0) -> Moments:
    power = np.full_like(error, 2.0)
    return Moments(tuple(0.1 * (1 + level) for level in range(error.shape[1])), error, slope * power, power)


@pytest.fixture(scope="module")
def hard() -> np.ndarray:
    """[N, 2] errors that differ far more between pictures than between models."""
    return np.exp(np.random.default_rng(0).normal(size=(PICTURES, 2)))


def test_a_small_difference_is_found_where_both_intervals_overlap(hard: np.ndarray) -> None:
    noise = 0.001 * np.random.default_rng(1).normal(size=hard.shape)
    found = compare([moments(hard), moments(0.99 * hard + noise)], total_loss)
    assert found.best == 1
    assert found.apart.tolist() == [[False, True], [True, False]]
    assert found.high[1] > found.low[0]
    assert found.wins.tolist() == [0.0, 1.0]
    assert found.difference[1, 0] == pytest.approx(found.value[1] - found.value[0])


def test_equal_models_do_not_differ_and_the_interval_is_nothing(hard: np.ndarray) -> None:
    found = compare([moments(hard), moments(hard)], total_loss)
    assert not found.apart.any()
    assert not found.reach.any()
    assert found.wins.tolist() == [1.0, 0.0]


def test_two_models_have_the_interval_of_the_naive_paired_bootstrap(hard: np.ndarray) -> None:
    """But for what Student's t adds of 60 pictures, about 3 %."""
    other = hard + np.random.default_rng(2).normal(size=hard.shape)
    found = compare([moments(other), moments(hard)], total_loss, seed=3)
    each = (other - hard).mean(axis=1)
    naive = np.array([row @ each for row in resampled(PICTURES, seed=3)])
    most = np.quantile(np.abs(naive - each.mean()), 0.95) / naive.std()
    student = stats.t.isf(stats.norm.sf(most), PICTURES - 1) * np.sqrt(PICTURES / (PICTURES - 1))
    assert found.reach[0, 1] == pytest.approx(student * naive.std())
    assert 1 < student / most < 1.04


def test_of_few_pictures_equal_models_are_not_told_apart() -> None:
    """The bootstrap alone tells all of those of 2 pictures apart, and half of those of 8."""
    for pictures in (2, 8):
        wrong = 0
        for trial in range(20):
            random = np.random.default_rng(100 + trial)
            same = [moments(random.normal(size=(pictures, 2))) for _ in range(8)]
            wrong += bool(compare(same, total_loss).apart.any())
        assert wrong <= 4  # 1 is expected


def test_two_models_of_few_pictures_have_students_interval() -> None:
    each = np.random.default_rng(4).normal(size=(FEW - 1, 1))
    found = compare([moments(each + 1), moments(np.ones_like(each))], total_loss)
    exact = stats.t.isf(0.025, FEW - 2) * each.std(ddof=1) / np.sqrt(len(each))
    assert found.reach[0, 1] == pytest.approx(exact, rel=0.06)  # the spread is that of 1,000 resamples


def test_students_t_is_scipys() -> None:
    for freedom in (1, 2, 3, 4, 7, 8, 63, 500):
        assert beyond(2.3, freedom) == pytest.approx(2 * stats.t.sf(2.3, freedom), rel=1e-9)
        for probability in (0.05, 1e-4, 1.0):
            exact = stats.t.isf(probability / 2, freedom)
            assert quantile(probability, freedom) == pytest.approx(exact, rel=1e-8, abs=1e-9)


def test_the_best_of_many_equals_is_not_called_better(hard: np.ndarray) -> None:
    wrong = 0
    for trial in range(40):
        random = np.random.default_rng(100 + trial)
        same = [moments(hard + 0.1 * random.normal(size=hard.shape)) for _ in range(12)]
        wrong += bool(compare(same, total_loss).apart.any())
    assert wrong <= 6  # 2 are expected; of single intervals for the best alone it would be most of them


def test_the_slope_counts_both_ways(hard: np.ndarray) -> None:
    found = compare([moments(hard, slope) for slope in (0.9, 1.0, 1.2)], slope_error)
    assert found.value.tolist() == pytest.approx([0.1, 0.0, 0.2])
    assert found.best == 1


def test_relative_losses_are_by_noise_level(hard: np.ndarray) -> None:
    found = relative_loss(moments(hard * np.array([1.0, 1.1])), moments(hard))
    assert found[:, 0].tolist() == pytest.approx([0.0, 0.1])
    assert found[:, 1:].tolist() == [pytest.approx([0.0, 0.0]), pytest.approx([0.1, 0.1])]
