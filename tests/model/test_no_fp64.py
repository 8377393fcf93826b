"""What asks for fp64 works on a device that has none, MPS: by a tensor that says it lives there and refuses fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import LoKr, LoRA, delta_norm
from libreflux.adapter.targets import Target, resolve
from libreflux.model.device import with_fp64
from libreflux.probing.drawing import mean_square
from libreflux.training.gradient import clip_grad_norm, group_norms
from tiny import tiny_transformer


class OnMPS(Tensor):
    """Computes on the CPU; `.cpu()` alone gives a plain tensor back."""

    device = property(lambda self: torch.device("mps"))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, OnMPS) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return out


def on_mps(tensor: Tensor) -> OnMPS:
    return tensor.detach().as_subclass(OnMPS)


def test_the_stand_in_refuses() -> None:
    x = on_mps(torch.ones(2))
    for asks in (lambda: x.double(), lambda: torch.linalg.vector_norm(x, dtype=torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            asks()
    assert with_fp64(x).double().dtype == torch.float64
    here = torch.ones(2, device="meta")
    assert with_fp64(here) is here


def test_norms_are_the_same_there() -> None:
    lora, lokr = LoRA(6, 4, 2, alpha=3.0), LoKr(6, 4, 2)
    for delta in (lora, lokr):
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        expected = delta_norm(delta)
        for name, parameter in list(delta.named_parameters()):
            delattr(delta, name)
            setattr(delta, name, on_mps(parameter))
        assert delta_norm(delta) == expected > 0
    gradient = torch.randn(100)
    assert clip_grad_norm(on_mps(gradient), None) == clip_grad_norm(gradient, None)
    x = torch.randn(3, 4, 5)
    assert mean_square(on_mps(x)).equal(mean_square(x))
    rows = resolve([("proj_out", 32, 64), ("x_embedder", 64, 32)], [Target(layers="**", factor=4)])
    adapter = attach(tiny_transformer(), rows)
    flat = torch.randn(sum(parameter.numel() for parameter in adapter.parameters()))
    found = group_norms(on_mps(flat), adapter)
    assert found == group_norms(flat, adapter)
    assert math.hypot(*found.values()) == pytest.approx(float(flat.norm()), rel=1e-6)
