"""First values: moments, norm ratio, tiles, keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from libreflux import seeding
from libreflux.adapter import init
from libreflux.adapter.init import Kind, init_lokr
from libreflux.adapter.layers import AdaptedLinear, LoKr, delta_weight, dense_weight
from libreflux.errors import AdapterError


def layer(
    in_features: int = 256, out_features: int = 192, factor: int = 4, dtype: torch.dtype = torch.float32
) -> AdaptedLinear:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features)
    with torch.no_grad():
        base.weight.add_(0.01)
    return AdaptedLinear(base, LoKr(in_features, out_features, factor, dtype=dtype))


def w2_of(adapted: AdaptedLinear) -> torch.Tensor:
    assert isinstance(adapted.delta, LoKr)
    return adapted.delta.lokr_w2.detach()


@pytest.mark.parametrize("size", [(256, 192, 4), (30, 42, 4), (16, 16, 1), (13, 7, 4)])
@pytest.mark.parametrize("scale", [1e-3, 0.1])
def test_perturbed_has_the_moments_of_w(size: tuple[int, int, int], scale: float) -> None:
    adapted = layer(*size)
    init_lokr(adapted, "perturbed", 0, "x", scale)
    w, w2 = dense_weight(adapted.base, "x"), w2_of(adapted)
    assert isinstance(adapted.delta, LoKr)
    assert bool(adapted.delta.lokr_w1.eq(1).all())
    assert w2.double().mean().item() == pytest.approx(scale * w.double().mean().item(), rel=1e-4)
    assert w2.double().std(correction=0).item() == pytest.approx(scale * w.double().std(correction=0).item(), rel=1e-5)
    assert (delta_weight(adapted.delta).norm() / w.norm()).item() == pytest.approx(scale, rel=1e-5)


def test_perturbed_tiles_are_equal_and_of_low_rank() -> None:
    adapted = layer()
    init_lokr(adapted, "perturbed", 0, "x")
    tiles = delta_weight(adapted.delta).reshape(4, 48, 4, 64)
    assert tiles.eq(tiles[:1, :, :1]).all()
    assert torch.linalg.matrix_rank(delta_weight(adapted.delta).double(), rtol=1e-6) == 48


@pytest.mark.parametrize("kind", ["kaiming", "ones"])
def test_identity(kind: Kind) -> None:
    adapted = layer()
    init_lokr(adapted, kind, 0, "x")
    x = torch.randn(3, 256)
    assert adapted(x).equal(adapted.base(x))


def test_kaiming_is_lycoris_start() -> None:
    """U(-1/sqrt(b), 1/sqrt(b)), which torch calls kaiming_uniform_(a=sqrt(5)): b = 64 with 64 x 64 numbers."""
    adapted = layer(64 * 64, 64 * 64, 64)
    init_lokr(adapted, "kaiming", 0, "x")
    assert isinstance(adapted.delta, LoKr)
    w1 = adapted.delta.lokr_w1.detach()
    reference = nn.init.kaiming_uniform_(torch.empty(64, 64), a=math.sqrt(5))
    assert w1.abs().max() <= 1 / 8
    assert reference.abs().max() <= 1 / 8
    ordered = w1.flatten().double().sort().values * 8
    distance = (ordered - torch.linspace(-1, 1, 4096, dtype=torch.float64)).abs().max() / 2
    assert distance < 1.95 / 64  # Kolmogorov-Smirnov, p = 0.001


def test_keyed_by_seed_and_name() -> None:
    results: list[torch.Tensor] = []
    for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        adapted = layer()
        torch.manual_seed(len(results))  # the global generator must not matter
        init_lokr(adapted, "perturbed", seed, name)
        results.append(w2_of(adapted).clone())
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])
    assert not results[0].equal(results[3])


def test_bf16_adapter_on_a_bf16_base() -> None:
    adapted = layer(dtype=torch.bfloat16)
    adapted.base.bfloat16()
    init_lokr(adapted, "perturbed", 0, "x")
    ratio = delta_weight(adapted.delta).norm() / dense_weight(adapted.base, "x").float().norm()
    assert ratio.item() == pytest.approx(1e-3, rel=1e-3)


def test_refusals() -> None:
    adapted = layer()
    with pytest.raises(AdapterError, match="kaiming, ones, perturbed"):
        init_lokr(adapted, "zeros", 0, "x")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="scale"):
        init_lokr(adapted, "perturbed", 0, "x", 0.0)

    class Int8Linear(nn.Module):
        in_features, out_features = 256, 192

    with pytest.raises(AdapterError, match="quantised"):
        init_lokr(AdaptedLinear(Int8Linear(), LoKr(256, 192, 4)), "perturbed", 0, "some.layer")


def test_a_card_makes_the_noise_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a card, whose generator it asks for: values then depend on the kind of device too."""
    asked: list[str] = []
    real = seeding.generator

    def generator(seed: int, purpose: str, *index: seeding.Part, device: torch.device | str = "cpu") -> torch.Generator:
        asked.append(str(device))
        return real(seed, purpose, *index)

    monkeypatch.setattr(seeding, "generator", generator)
    adapted = layer()
    init_lokr(adapted, "perturbed", 0, "x")
    assert asked == ["cpu"]
    monkeypatch.setattr(init, "CARDS", ("cpu",))
    again = layer()
    init_lokr(again, "perturbed", 0, "x")
    assert asked == ["cpu", "cpu", "cpu"]
    assert w2_of(again).equal(w2_of(adapted))


def test_noise_is_drawn_where_its_generator_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, object]] = []
    real = torch.randn

    def randn(*size: Any, **how: Any) -> torch.Tensor:
        drawn.append(how)
        return real(*size, **how)

    monkeypatch.setattr(torch, "randn", randn)
    generator = seeding.generator(0, "x")
    init.perturbed_w2(torch.ones(4, 4), (2, 2), 1e-3, generator)
    assert drawn == [{"generator": generator, "dtype": torch.float64, "device": torch.device("cpu")}]
