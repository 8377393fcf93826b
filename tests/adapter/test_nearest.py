"""The nearest LoRA and the nearest sum of Kronecker products: planted ones are found, others are at the optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.nearest import nearest_kroneckers, nearest_lora


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_planted_low_rank_matrix_is_found(shape: tuple[int, int]) -> None:
    planted = random(shape[0], 3, seed=1) @ random(3, shape[1], seed=2)
    up, down = nearest_lora(planted, 3)
    assert (up.shape, down.shape, up.dtype) == ((shape[0], 3), (3, shape[1]), torch.float32)
    assert off(up @ down, planted) < 1e-5
    assert off(nearest_lora(planted, 2)[0] @ nearest_lora(planted, 2)[1], planted) > 1e-2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_error_of_a_rank_is_what_the_singular_values_leave(shape: tuple[int, int]) -> None:
    """Eckart and Young: no matrix of rank 5 is nearer."""
    matrix = random(*shape)
    up, down = nearest_lora(matrix, 5)
    left = torch.linalg.svdvals(matrix.double())[5:].norm()
    assert float((matrix - up @ down).norm()) == pytest.approx(float(left), rel=1e-5)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-5)


def test_a_rank_above_the_sides_is_the_whole_matrix_and_zeros_stay_zeros() -> None:
    matrix = random(6, 9)
    up, down = nearest_lora(matrix, 50)
    assert up.shape == (6, 6)
    assert off(up @ down, matrix) < 1e-5
    up, down = nearest_lora(torch.zeros(6, 9), 2)
    assert torch.equal(up @ down, torch.zeros(6, 9))


@pytest.mark.parametrize("factor", [1, 2, 4, 5, 7, 16, -1])
def test_a_planted_kronecker_product_is_found(factor: int) -> None:
    """Of 24 x 40; 5 divides one side alone, 7 and 16 neither."""
    [(w1, w2)] = nearest_kroneckers(random(24, 40), factor)
    planted = torch.kron(random(*w1.shape, seed=1), random(*w2.shape, seed=2))
    [(w1, w2)] = nearest_kroneckers(planted, factor)
    assert off(torch.kron(w1, w2), planted) < 1e-5
    assert (w1.shape, w2.shape) == lokr_shapes(40, 24, factor)


def test_two_planted_kronecker_products_are_two_terms_and_one_is_not_enough() -> None:
    planted = sum(torch.kron(random(4, 4, seed=s), random(6, 10, seed=s + 9)) for s in (1, 2))
    assert isinstance(planted, Tensor)
    assert off(torch.kron(*nearest_kroneckers(planted, 4)[0]), planted) > 1e-2
    terms = nearest_kroneckers(planted, 4, 2)
    assert off(sum(torch.kron(*pair) for pair in terms), planted) < 1e-5  # type: ignore[arg-type]
    assert torch.kron(*terms[0]).norm() > torch.kron(*terms[1]).norm()


def test_no_other_kronecker_product_is_nearer() -> None:
    """Against the singular values of the rearranged matrix, made block by block."""
    matrix = random(8, 12)
    [(w1, w2)] = nearest_kroneckers(matrix, 4)
    (a, b), (c, d) = w1.shape, w2.shape
    rows = [matrix[i * c : (i + 1) * c, j * d : (j + 1) * d].reshape(-1) for i in range(a) for j in range(b)]
    left = torch.linalg.svdvals(torch.stack(rows).double())[1:].norm()
    assert float((matrix - torch.kron(w1, w2)).norm()) == pytest.approx(float(left), rel=1e-5)
