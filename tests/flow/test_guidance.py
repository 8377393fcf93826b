"""Rules of guidance: cases whose results are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libreflux.flow.guidance import apg, cfg, cfg_zero_star, parallel, zero_star_scale


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def both() -> tuple[Tensor, Tensor]:
    """Conditional and unconditional velocities of three samples."""
    return drawn(3, 4, 8), drawn(3, 4, 8, seed=1)


def test_parallel_part_of_known_vectors() -> None:
    update, onto = torch.tensor([[3.0, 4.0], [5.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert parallel(update, onto).tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_apg_at_eta_1_without_radius_and_momentum_is_cfg_to_the_bit(both: tuple[Tensor, Tensor]) -> None:
    x = drawn(3, 4, 8, seed=2)
    found, _ = apg(*both, 3.5, x=x, sigma=0.7, eta=1.0, average=drawn(3, 4, 8, seed=3))
    assert torch.equal(found, cfg(*both, 3.5))


@pytest.mark.parametrize(("eta", "expected"), [(0.0, [-1.0, -5.0]), (0.5, [-2.0, -5.0]), (1.0, [-3.0, -5.0])])
def test_apg_of_known_parallel_and_orthogonal_parts(eta: float, expected: list[float]) -> None:
    # x = 0, sigma = 1: pictures are -v. D_c = (1, 0) is the parallel direction; D_c - D_u = (1, 2.5).
    v_cond, v_uncond = torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.0, 2.5]])
    found, update = apg(v_cond, v_uncond, 3.0, x=torch.zeros(1, 2), sigma=1.0, eta=eta)
    assert found.tolist() == [expected]
    assert update.tolist() == [[1.0, 2.5]]


def test_apg_limits_the_norm_of_the_update_in_pictures(both: tuple[Tensor, Tensor]) -> None:
    x, sigma = drawn(3, 4, 8, seed=2), 0.5
    found, _ = apg(*both, 2.0, x=x, sigma=sigma, eta=1.0, radius=0.25)
    added = -sigma * (found - both[0])
    torch.testing.assert_close(added.flatten(1).norm(dim=1), torch.full((3,), 0.25))


def test_apg_leaves_an_update_within_the_radius(both: tuple[Tensor, Tensor]) -> None:
    found, _ = apg(*both, 2.0, x=drawn(3, 4, 8, seed=2), sigma=0.5, eta=1.0, radius=1e6)
    assert torch.equal(found, cfg(*both, 2.0))


def test_apg_carries_its_momentum(both: tuple[Tensor, Tensor]) -> None:
    before, sigma = drawn(3, 4, 8, seed=3), 0.5
    x = drawn(3, 4, 8, seed=2)
    found, update = apg(*both, 2.0, x=x, sigma=sigma, eta=1.0, momentum=-0.5, average=before)
    torch.testing.assert_close(update, -sigma * (both[0] - both[1]) - 0.5 * before)
    torch.testing.assert_close(found, both[0] - update / sigma)


def test_apg_of_a_sample_is_the_same_in_a_batch(both: tuple[Tensor, Tensor]) -> None:
    x, before = drawn(3, 4, 8, seed=2), drawn(3, 4, 8, seed=3)
    whole, _ = apg(*both, 4.0, x=x, sigma=0.5, radius=1.0, momentum=-0.5, average=before)
    one, _ = apg(both[0][1:2], both[1][1:2], 4.0, x=x[1:2], sigma=0.5, radius=1.0, momentum=-0.5, average=before[1:2])
    torch.testing.assert_close(whole[1:2], one)


def test_equal_velocities_have_a_zero_star_scale_of_1() -> None:
    v = torch.tensor([[1.0, 2.0, -2.0], [0.5, 0.0, 4.0]])
    assert zero_star_scale(v, v).tolist() == [[1.0], [1.0]]


def test_the_zero_star_scale_makes_the_rest_orthogonal(both: tuple[Tensor, Tensor]) -> None:
    rest = both[0] - zero_star_scale(*both) * both[1]
    torch.testing.assert_close((rest * both[1]).sum((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)


def test_cfg_zero_star_with_a_scale_of_1_is_cfg_to_the_bit() -> None:
    v_uncond = torch.tensor([[2.0, 0.0, 1.0]])
    v_cond = v_uncond + torch.tensor([[0.0, 3.0, 0.0]])  # what is added is orthogonal, so that s = 1
    assert torch.equal(cfg_zero_star(v_cond, v_uncond, 2.7), cfg(v_cond, v_uncond, 2.7))


def test_cfg_zero_star_without_an_unconditional_velocity_is_g_times_the_other() -> None:
    assert cfg_zero_star(torch.ones(1, 2), torch.zeros(1, 2), 3.0).tolist() == [[3.0, 3.0]]
