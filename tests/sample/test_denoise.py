"""The loop that draws, on fields whose solution is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from libreflux.flow.schedule import ladder
from libreflux.sample.denoise import denoise

MEAN, STD = 1.5, 0.3


def gaussian_velocity(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
    """E[noise - x0 | x_sigma] for x0 ~ N(MEAN, STD^2): linear in x."""
    a, s = 1 - sigma, sigma
    variance = (a * STD) ** 2 + s**2
    return (s - a * STD**2) / variance * (x - a * MEAN) - MEAN


def exact_end(x: torch.Tensor) -> torch.Tensor:
    """The probability-flow map from sigma 1 to 0 takes N(0, 1) to N(MEAN, STD^2) monotonically."""
    return MEAN + STD * x


def end(steps: int, x: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    *_, last = denoise(gaussian_velocity, x, ladder(steps, shift))
    return last.x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_converges_with_first_order(shift: float) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(end(n, x, shift) - exact_end(x)).abs().max().item() for n in (100, 200, 400, 800)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders), orders
    assert errors[-1] < 0.01


def test_a_straight_field_is_exact_in_one_step() -> None:
    x0, noise = torch.tensor([0.25, -1.0]), torch.tensor([2.0, 0.5])
    (step,) = denoise(lambda x, sigma, index: noise - x0, noise, ladder(1))
    assert torch.equal(step.x, x0)


def test_steps_say_where_they_are_and_end_where_they_should() -> None:
    seen: list[float] = []
    numbers: list[int] = []

    def field(x: torch.Tensor, sigma: float, index: int) -> torch.Tensor:
        seen.append(sigma)
        numbers.append(index)
        return torch.ones_like(x)

    sigmas = ladder(5, shift=2.0)
    steps = list(denoise(field, torch.zeros(2), sigmas))
    assert numbers == [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert seen == [s.sigma for s in steps] == sigmas[:-1].tolist()
    assert [s.sigma_next for s in steps] == sigmas[1:].tolist()
    for step in steps:  # dx/dsigma = 1 from x(1) = 0
        torch.testing.assert_close(step.x, torch.full((2,), step.sigma_next - 1))


def test_bf16_velocities_are_accumulated_in_fp32() -> None:
    """1000 steps of 1e-3: bf16 accumulation would stall at once, having 3 significant digits."""
    *_, last = denoise(lambda x, s, i: torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1.0), ladder(1000))
    assert last.x.dtype == torch.float32
    torch.testing.assert_close(last.x, torch.zeros(1), atol=1e-4, rtol=0)
    *_, low = denoise(lambda x, s, i: x * 0 + 1, torch.full((1,), 1.0, dtype=torch.bfloat16), ladder(1000))
    torch.testing.assert_close(low.x, torch.zeros(1), atol=1e-4, rtol=0)
