"""Paths against fields whose paths are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from libreflux.flow.schedule import ladder
from libreflux.model.latents import pack, unpack
from libreflux.probing.drawing import Drawn, PictureBatch, draw
from libreflux.probing.sections.diversity import mean_pairwise
from libreflux.sample.denoise import StepVelocity
from libreflux.sample.noise import noise
from mixture import component_velocity, null

SHAPE = (4, 8, 8)


def stepped(field: Callable[[Tensor, Tensor], Tensor]) -> StepVelocity:
    """A field on [N, 4, 8, 8], sigma [N], as `draw` wants one."""

    def at(x: Tensor, sigma: float, step: int) -> Tensor:
        return pack(field(unpack(x, *SHAPE[1:]), torch.full((len(x),), sigma)))

    return at


def straightness(drawn: Drawn) -> float:
    return float((drawn.energy - drawn.length).mean() / drawn.length.mean())


def test_a_straight_field_is_straight_and_what_bends_is_measured_as_the_sum_says() -> None:
    x, velocities = noise(range(6), *SHAPE), []
    target = torch.full(SHAPE, 0.3)
    assert straightness(draw(stepped(lambda state, s: x - target), x, ladder(7))) == pytest.approx(0, abs=1e-6)

    def field(state: Tensor, sigma: Tensor) -> Tensor:
        velocities.append(null(state, sigma))
        return velocities[-1]

    drawn = draw(stepped(field), x, ladder(9))
    whole = x - drawn.latents
    summed = sum((whole - v).square().mean() / 9 for v in velocities) / whole.square().mean()
    assert straightness(drawn) == pytest.approx(float(summed), rel=1e-4)
    assert straightness(drawn) > 0.02


def test_the_exact_velocity_of_a_gaussian_draws_that_gaussian() -> None:
    mean, std = torch.tensor(0.4), torch.tensor(0.5)
    field = stepped(lambda x, s: component_velocity(x, s, mean, std))
    drawn = draw(field, noise(range(50), *SHAPE), ladder(200))
    assert drawn.latents.mean() == pytest.approx(0.4, abs=0.02)
    assert drawn.latents.std() == pytest.approx(0.5, rel=0.02)


def test_a_drawing_knows_how_many_samples_it_sends_through_the_model() -> None:
    assert [PictureBatch(("a",) * 3, (0, 1, 2), scale, 5).passes for scale in (1.0, 3.0)] == [15, 30]
    with pytest.raises(ValueError, match="2 seeds"):
        PictureBatch(("a",), (0, 1), 1.0, 5)


def test_diversity_is_zero_for_a_collapsed_model_and_root_two_for_white_noise() -> None:
    alike = torch.randn(3, 1, *SHAPE, generator=torch.Generator().manual_seed(0)).expand(3, 5, *SHAPE)
    np.testing.assert_array_equal(mean_pairwise(alike), 0)
    white = torch.randn(3, 5, 10_000, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(mean_pairwise(white), 2**0.5, rtol=0.01)
