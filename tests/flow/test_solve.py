from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from libreflux.flow.schedule import ladder, shift_for_tokens, shift_sigmas
from libreflux.flow.solve import euler

MEAN, STD = 1.5, 0.3


def gaussian_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[noise - x0 | x_sigma] for x0 ~ N(MEAN, STD^2): linear in x."""
    a, s = 1 - sigma, sigma
    variance = (a * STD) ** 2 + s**2
    return (s - a * STD**2) / variance * (x - a * MEAN) - MEAN


def exact_end(x: torch.Tensor) -> torch.Tensor:
    """The probability-flow map from sigma 1 to 0 takes N(0, 1) to N(MEAN, STD^2) monotonically."""
    return MEAN + STD * x


def end(steps: int, x: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    *_, last = euler(gaussian_velocity, x, ladder(steps, shift))
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
    (step,) = euler(lambda x, sigma: noise - x0, noise, ladder(1))
    assert torch.equal(step.x, x0)


def test_steps_say_where_they_are_and_end_where_they_should() -> None:
    seen: list[float] = []

    def field(x: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append(sigma)
        return torch.ones_like(x)

    sigmas = ladder(5, shift=2.0)
    steps = list(euler(field, torch.zeros(2), sigmas))
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    assert seen == [s.sigma for s in steps] == sigmas[:-1].tolist()
    assert [s.sigma_next for s in steps] == sigmas[1:].tolist()
    for step in steps:  # dx/dsigma = 1 from x(1) = 0
        torch.testing.assert_close(step.x, torch.full((2,), step.sigma_next - 1))


def test_bf16_velocities_are_accumulated_in_fp32() -> None:
    """1000 steps of 1e-3: bf16 accumulation would stall at once, having 3 significant digits."""
    *_, last = euler(lambda x, s: torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1.0), ladder(1000))
    assert last.x.dtype == torch.float32
    torch.testing.assert_close(last.x, torch.zeros(1), atol=1e-4, rtol=0)
    *_, low = euler(lambda x, s: x * 0 + 1, torch.full((1,), 1.0, dtype=torch.bfloat16), ladder(1000))
    torch.testing.assert_close(low.x, torch.zeros(1), atol=1e-4, rtol=0)


def test_ladder_follows_the_formula() -> None:
    assert ladder(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    for steps, shift in [(28, 1.0), (28, 1.65), (50, 3.16), (1, 3.0)]:
        wanted = [shift * t / (1 + (shift - 1) * t) for t in ((steps - i) / steps for i in range(steps))] + [0.0]
        sigmas = ladder(steps, shift)
        assert sigmas.dtype == torch.float32
        torch.testing.assert_close(sigmas, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_ladder_agrees_with_the_exponential_form_of_the_shift() -> None:
    """Black Forest Labs write e^mu / (e^mu + (1/t - 1)); same function for s = e^mu."""
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    for tokens in (256, 1024, 4096):
        shift = shift_for_tokens(tokens)
        torch.testing.assert_close(shift_sigmas(t, shift), shift / (shift + (1 / t - 1)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.65), (1024, 1.88), (4096, 3.16)])
def test_shift_for_tokens(tokens: int, shift: float) -> None:
    assert shift_for_tokens(tokens) == pytest.approx(shift, abs=0.005)


def test_shift_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    import numpy as np

    for tokens in (256, 1024, 4096):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=math.log(shift_for_tokens(tokens)))
        torch.testing.assert_close(ladder(28, shift_for_tokens(tokens)), scheduler.sigmas, atol=1e-6, rtol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        ladder(0)
    with pytest.raises(ValueError, match="shift is 0"):
        ladder(4, shift=0)
