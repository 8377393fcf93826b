from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate, noise_from_velocity, velocity_target, x0_from_velocity


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, generator=g, dtype=dtype), torch.randn(4, 3, 5, generator=g, dtype=dtype)


def test_ends_of_the_path() -> None:
    x0, noise = pair()
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.equal(interpolate(x0, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = pair()
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    spread = torch.ones_like(x0, requires_grad=True)  # one sigma per entry, to read d x / d sigma entry by entry
    per_entry = sigma.detach().reshape(-1, 1, 1) * spread
    per_entry.retain_grad()
    ((1 - per_entry) * x0 + per_entry * noise).sum().backward()
    assert per_entry.grad is not None
    torch.testing.assert_close(per_entry.grad, velocity_target(x0, noise))
    h = 1e-6
    difference = (interpolate(x0, noise, sigma + h) - interpolate(x0, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(difference, velocity_target(x0, noise), atol=1e-8, rtol=0)


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_the_velocity_gives_back_both_ends(sigmas: list[float]) -> None:
    x0, noise = pair()
    sigma = torch.tensor(sigmas)
    x, v = interpolate(x0, noise, sigma), velocity_target(x0, noise)
    torch.testing.assert_close(x0_from_velocity(x, v, sigma), x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(noise_from_velocity(x, v, sigma), noise, atol=1e-12, rtol=0)


def test_sigma_per_sample_equals_samples_one_by_one() -> None:
    x0, noise = pair()
    sigma = torch.tensor([0.2, 0.3, 0.5, 0.8])
    together = interpolate(x0, noise, sigma)
    for i in range(4):
        assert torch.equal(together[i], interpolate(x0[i : i + 1], noise[i : i + 1], sigma[i].double())[0])


def test_bf16_is_promoted_to_fp32() -> None:
    x0, noise = pair(torch.bfloat16)
    result = interpolate(x0, noise, torch.full((4,), 0.7001))
    assert result.dtype == torch.float32
    assert velocity_target(x0, noise).dtype == torch.float32
    torch.testing.assert_close(result, interpolate(x0.float(), noise.float(), 0.7001))


def test_a_sigma_that_is_not_one_per_sample_is_refused() -> None:
    x0, noise = pair()
    with pytest.raises(ValueError, match="one per sample"):
        interpolate(x0, noise, torch.zeros(3))


def test_cfg() -> None:
    c, u = pair()
    assert torch.equal(cfg(c, u, 0.0), u)
    torch.testing.assert_close(cfg(c, u, 1.0), c)
    torch.testing.assert_close(cfg(c, u, 3.5), 3.5 * c - 2.5 * u)
