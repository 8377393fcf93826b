"""Sigma ladders and shifts, against their formulas and diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from libreflux.flow.schedule import ladder, shift_for_tokens, shift_sigmas


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
