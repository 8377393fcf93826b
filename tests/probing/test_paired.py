"""Paired comparison: differences that are there are found, others are not, whoever is chosen as the best."""

from __future__ import annotations

import numpy as np
import pytest

from libreflux.probing.metrics.measures import Moments, resampled
from libreflux.probing.metrics.paired import compare, relative_loss, slope_error, total_loss

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
    other = hard + np.random.default_rng(2).normal(size=hard.shape)
    found = compare([moments(other), moments(hard)], total_loss, seed=3)
    each = (other - hard).mean(axis=1)
    naive = np.array([row @ each for row in resampled(PICTURES, seed=3)])
    away = np.abs(naive - each.mean())
    assert found.reach[0, 1] == pytest.approx(np.quantile(away, 0.95))


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
