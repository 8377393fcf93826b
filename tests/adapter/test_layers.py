"""LoKr against the dense Kronecker product, its gradients, shapes and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris.functional.general import factorization as lycoris_factorization
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from libreflux.adapter.factors import factorization, lokr_shapes
from libreflux.adapter.layers import (
    AdaptedLinear,
    LoKr,
    LoRA,
    delta_from_tensors,
    delta_weight,
    dense_weight,
    linears,
    lokr_apply,
)
from libreflux.errors import AdapterError

# (in, out, factor); 30 and 42 are not divisible by 4, 13 is prime, the wide and tall ones take different orders.
SIZES = [(32, 32, 4), (30, 42, 4), (13, 24, 5), (64, 8, 8), (8, 64, 8), (16, 16, 1), (48, 20, -1), (7, 7, 16)]


def filled(in_features: int, out_features: int, factor: int, dtype: torch.dtype = torch.float64) -> LoKr:
    generator = torch.Generator().manual_seed(in_features * 1000 + out_features)
    lokr = LoKr(in_features, out_features, factor, dtype=dtype)
    with torch.no_grad():
        for parameter in lokr.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lokr


@given(st.integers(1, 4096), st.one_of(st.just(-1), st.integers(1, 64)))
def test_factorization_is_lycoris_own(dim: int, factor: int) -> None:
    assert factorization(dim, factor) == lycoris_factorization(dim, factor)


@pytest.mark.parametrize(
    ("dim", "factor", "expected"),
    [(3072, 4, (4, 768)), (3072, 5, (4, 768)), (3072, 10, (8, 384)), (15360, 5, (5, 3072)), (3072, 1, (1, 3072))],
)
def test_factorization_of_flux_widths(dim: int, factor: int, expected: tuple[int, int]) -> None:
    assert factorization(dim, factor) == expected


@pytest.mark.parametrize("factor", [0, -2])
def test_factor_that_is_no_size(factor: int) -> None:
    with pytest.raises(AdapterError, match=str(factor)):
        factorization(12, factor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (2, 5)])
def test_forward_is_the_kronecker_product(size: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    lokr = filled(*size)
    x = torch.randn(*lead, size[0], dtype=torch.float64)
    expected = x @ torch.kron(lokr.lokr_w1, lokr.lokr_w2).T
    assert lokr(x).shape == (*lead, size[1])
    torch.testing.assert_close(lokr(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(delta_weight(lokr), torch.kron(lokr.lokr_w1, lokr.lokr_w2).detach())


def test_the_cheaper_contraction_order_is_taken() -> None:
    """Counted multiplications are those of the better of the two orders, and the sizes above need both."""
    orders = set()
    for in_features, out_features, factor in SIZES:
        (a, b), (c, d) = lokr_shapes(in_features, out_features, factor)
        assert (a * c, b * d) == (out_features, in_features)
        w2_first, w1_first = b * c * (d + a), a * d * (b + c)
        if min(a, b, c, d) == 1:
            continue  # einsum multiplies without a matmul then, which the counter does not see
        with FlopCounterMode(display=False) as flops:
            lokr_apply(torch.ones(6, in_features), torch.ones(a, b), torch.ones(c, d))
        assert flops.get_total_flops() == 2 * 6 * min(w2_first, w1_first)
        orders.add(w2_first <= w1_first)
    assert orders == {True, False}


def test_the_product_is_never_built() -> None:
    """At FLUX' widths no tensor of in x out elements appears, forward or backward."""
    lokr = LoKr(3072, 3072, 4, dtype=torch.bfloat16)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    with Watch():
        lokr(torch.ones(2, 3072, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert max(seen) == 768 * 768


@pytest.mark.parametrize("size", [(12, 20, 4), (20, 6, 3), (7, 9, 3)])
def test_gradients(size: tuple[int, int, int]) -> None:
    lokr = filled(*size)
    x = torch.randn(3, size[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lokr_apply, (x, lokr.lokr_w1, lokr.lokr_w2))
    lora = LoRA(size[0], size[1], 2, alpha=3.0, dtype=torch.float64)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    assert torch.autograd.gradcheck(lora, (x,))


def test_lora_is_its_dense_delta() -> None:
    lora = LoRA(10, 6, 3, alpha=1.5, dtype=torch.float64)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(lora(x), x @ delta_weight(lora).T)
    torch.testing.assert_close(delta_weight(lora), 0.5 * (lora.lora_up @ lora.lora_down).detach())


def test_identity_at_zero_and_strength() -> None:
    base = nn.Linear(12, 8)
    layer = AdaptedLinear(base, LoKr(12, 8, 2))
    x = torch.randn(5, 12)
    assert layer(x).equal(base(x))
    layer.delta = filled(12, 8, 2, torch.float32)
    layer.strength = -0.5
    torch.testing.assert_close(layer(x), base(x) - 0.5 * layer.delta(x))


def test_only_the_adapter_learns_and_the_model_keeps_its_dtype() -> None:
    layer = AdaptedLinear(nn.Linear(12, 8).bfloat16(), filled(12, 8, 2, torch.float32))
    layer(torch.randn(5, 12, dtype=torch.bfloat16)).float().sum().backward()
    assert layer.base.weight.grad is None
    assert all(parameter.grad is not None for parameter in layer.delta.parameters())
    assert next(layer.parameters()).dtype == torch.bfloat16  # what diffusers reports as the model's dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64, 4), (64, 16, 8), (16, 64, 8)])
def test_bf16_autocast_with_checkpointing(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Output and gradients agree with fp32 to bf16's precision, and checkpointing changes no bit of them."""
    torch.manual_seed(0)
    layer = AdaptedLinear(nn.Linear(size[0], size[1]), filled(*size, dtype))
    x = torch.randn(2, 9, size[0], requires_grad=True)
    parameters = list(layer.delta.parameters())

    def run(autocast: bool, checkpointed: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *parameters])]

    exact, plain, checkpointed = run(False, False), run(True, False), run(True, True)
    for one, two, three in zip(exact, plain, checkpointed, strict=True):
        assert two.equal(three)
        assert (two.float() - one.float()).norm() < 0.02 * one.float().norm()


def test_a_small_delta_survives_a_bf16_base() -> None:
    """1e-3 of W: added beside the base it keeps its direction; rounded into a bf16 W most of it is lost."""
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False).bfloat16()
    lokr = filled(256, 256, 4, torch.float32)
    with torch.no_grad():
        lokr.lokr_w2.mul_(1e-3 * base.weight.float().norm() / delta_weight(lokr).norm())
    delta = delta_weight(lokr)
    rounded = (base.weight.float() + delta).bfloat16().float() - base.weight.float()
    assert (rounded - delta).norm() > 0.5 * delta.norm()
    x = torch.randn(64, 256).bfloat16()
    assert (lokr(x).float() - x.float() @ delta.T).norm() < 0.02 * (x.float() @ delta.T).norm()


def test_linears_names_an_adapted_layer_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 2), "norm": nn.LayerNorm(4)}))
    assert list(linears(model)) == ["0", "1.a"]
    model[0] = AdaptedLinear(AdaptedLinear(model[0], LoKr(4, 4, 2)), LoKr(4, 4, 1))
    assert list(linears(model)) == ["0", "1.a"]
    with pytest.raises(AdapterError, match="detach"):
        dense_weight(model[0], "0")


def test_low_rank_factors_and_scale() -> None:
    """alpha / rank applies once when a factor is low-rank; LyCORIS ignores alpha for two full matrices."""
    w1, left, right = torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 5)
    low = delta_from_tensors(
        {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(0.5)}, 15, 8, "layer"
    )
    torch.testing.assert_close(delta_weight(low), 0.25 * torch.kron(w1, left @ right))
    full = delta_from_tensors({"lokr_w1": w1, "lokr_w2": left @ right, "alpha": torch.tensor(0.5)}, 15, 8, "layer")
    torch.testing.assert_close(delta_weight(full), torch.kron(w1, left @ right))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"lokr_w1": (2, 3)}, "lokr_w2"),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 4)}, "does not fit"),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5), "dora_scale": (8, 1)}, "dora_scale not supported"),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5), "hada_w1": (1,)}, "hada_w1"),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 5)}, "multiply"),
        ({"lora_down.weight": (2, 15)}, "lora_up"),
        ({"lora_down.weight": (2, 15), "lora_up.weight": (8, 3)}, "does not fit"),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5), "lora_up.weight": (8, 2)}, "LoKr and LoRA"),
    ],
)
def test_broken_tensors_are_refused(tensors: dict[str, tuple[int, ...]], match: str) -> None:
    with pytest.raises(AdapterError, match=match) as caught:
        delta_from_tensors({key: torch.ones(shape) for key, shape in tensors.items()}, 15, 8, "some.layer")
    assert "some.layer" in str(caught.value)
