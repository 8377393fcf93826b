"""LoKr and LoRA added in one step of autograd, beside their plain twins: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from libreflux.adapter.products import add_lokr, add_lora, large_first, lokr_apply

SHAPES = [((2, 4), (6, 3)), ((4, 2), (3, 6)), ((3, 3), (4, 4)), ((1, 1), (5, 7)), ((4, 4), (12, 3)), ((4, 4), (3, 12))]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(made: Callable[..., Tensor], *given: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [one.clone().requires_grad_() for one in given]
    out = made(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_both_orders_are_among_the_shapes() -> None:
    assert {large_first(random(*w1, seed=1), random(*w2, seed=2)) for w1, w2 in SHAPES} == {True, False}


@pytest.mark.parametrize("strength", [1.0, -0.3])
@pytest.mark.parametrize(("w1", "w2"), SHAPES)
def test_lokr_is_its_plain_twin(w1: tuple[int, int], w2: tuple[int, int], strength: float) -> None:
    """And that of the Kronecker product itself; `out` is another product's, as a base gives it."""
    small, large = random(*w1, seed=1), random(*w2, seed=2)
    x, weight = random(2, 5, w1[1] * w2[1], seed=3), random(w1[0] * w2[0], w1[1] * w2[1], seed=4)
    upstream = random(2, 5, w1[0] * w2[0], seed=5)

    def fast(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return add_lokr(x @ weight.T, x, w1, w2, strength)

    def plain(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return x @ weight.T + strength * lokr_apply(x, w1, w2)

    def dense(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return x @ weight.T + strength * x @ torch.kron(w1, w2).T

    found = gradients(fast, x, small, large, upstream=upstream)
    close(found, gradients(plain, x, small, large, upstream=upstream))
    close(found, gradients(dense, x, small, large, upstream=upstream))


@pytest.mark.parametrize(("w1", "w2"), SHAPES)
def test_strided_inputs_and_gradients(w1: tuple[int, int], w2: tuple[int, int]) -> None:
    """Rows that are parts of longer ones, as where tensors are joined along their last dimension."""
    small, large = random(*w1, seed=1), random(*w2, seed=2)
    width, out = w1[1] * w2[1], w1[0] * w2[0]
    x, upstream = random(6, width + 3, seed=3)[:, 1 : width + 1], random(6, out + 2, seed=4)[:, 2:]
    found = []
    for made in (lambda x, *w: add_lokr(x.new_zeros(6, out), x, *w), lokr_apply):
        leaves = [x.detach().requires_grad_(), small.clone().requires_grad_(), large.clone().requires_grad_()]
        found.append(torch.autograd.grad(made(*leaves), leaves, upstream))
    close(*found)


def test_stacked_adapters_and_outputs_that_are_views() -> None:
    first, second = [(random(2, 2, seed=1), random(3, 3, seed=2)), (random(3, 3, seed=3), random(2, 2, seed=4))]
    x, weight, upstream = random(4, 6, seed=5), random(12, 6, seed=6), random(4, 6, seed=7)

    def fast(x: Tensor, *w: Tensor) -> Tensor:
        base = (x @ weight.T)[:, :6]  # a view of something that autograd knows
        return add_lokr(add_lokr(base, x, w[0], w[1]), x, w[2], w[3], 0.5)

    def plain(x: Tensor, *w: Tensor) -> Tensor:
        return (x @ weight.T)[:, :6] + lokr_apply(x, w[0], w[1]) + 0.5 * lokr_apply(x, w[2], w[3])

    given = (x, *first, *second)
    close(gradients(fast, *given, upstream=upstream), gradients(plain, *given, upstream=upstream))


def test_without_gradients_the_output_is_overwritten() -> None:
    w1, w2, x, out = random(2, 2, seed=1), random(3, 3, seed=2), random(4, 6, seed=3), random(4, 6, seed=4)
    before = out.clone()
    with torch.no_grad():
        assert add_lokr(out, x, w1, w2) is out
    torch.testing.assert_close(out, before + lokr_apply(x, w1, w2))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_lora_is_its_plain_twin(scale: float) -> None:
    down, up, x = random(2, 6, seed=1), random(8, 2, seed=2), random(2, 5, 6, seed=3)
    weight, upstream = random(8, 6, seed=4), random(2, 5, 8, seed=5)

    def fast(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return add_lora(x @ weight.T, x, down, up, scale)

    def plain(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return x @ weight.T + scale * x @ down.T @ up.T

    close(
        gradients(fast, x, down, up, upstream=upstream),
        gradients(plain, x, down, up, upstream=upstream),
    )
