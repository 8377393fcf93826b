"""Distances against closed forms."""

from __future__ import annotations

import pytest
import torch

from libreflux.probing.metrics.distances import frechet, frechet_distance, kernel_distance


def sample(count: int, mean: list[float], scale: list[float], seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(mean), generator=draw, dtype=torch.float64) * torch.tensor(scale) + torch.tensor(mean)


def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double()
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 0.5]).double()
    closed = 9.0 + (1.0 - 2.0) ** 2 + (2.0 - 0.5) ** 2
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = [turn @ torch.diag(scale**2) @ turn.T for scale in (a, b)]
    assert frechet(mean_a, torch.diag(a**2), mean_b, torch.diag(b**2)) == pytest.approx(closed, abs=1e-9)
    assert frechet(turn @ mean_a, turned[0], turn @ mean_b, turned[1]) == pytest.approx(closed, abs=1e-9)


def test_the_frechet_distance_of_samples_nears_it_and_is_zero_for_one_set() -> None:
    a, b = sample(40_000, [0, 1], [1, 2], 0), sample(40_000, [3, 1], [2, 0.5], 1)
    assert frechet_distance(a, b) == pytest.approx(12.25, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = sample(5, [0.0] * 12, [1.0] * 12, 2)  # fewer pictures than features: singular covariances
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_of_points_is_the_closed_form_and_unbiased_for_equal_laws() -> None:
    zeros, ones = torch.zeros(3, 2), torch.ones(4, 2)
    assert kernel_distance(zeros, ones) == pytest.approx(1 + 2**3 - 2 * 1)  # k(0,0) + k(1,1) - 2 k(0,1), D = 2
    draws = [kernel_distance(sample(40, [0, 0], [1, 1], i), sample(40, [0, 0], [1, 1], 1000 + i)) for i in range(300)]
    mean, error = torch.tensor(draws).mean(), torch.tensor(draws).std() / 300**0.5
    assert abs(mean) < 3 * error
    assert min(draws) < 0 < max(draws)
