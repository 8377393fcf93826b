"""One adapted linear, forward and backward, beside the bare frozen one and lycoris-lora's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.speed.sizes import Size
from benchmarks.speed.timing import Contender, Run
from torch import nn

from libreflux.adapter.layers import AdaptedLinear, LoKr

FACTOR = 4
BARE = "bare frozen linear"
OURS_LAYER = "ours"


def contenders(size: Size, rows: int, device: str) -> list[Contender]:
    """Of the first linear of a feed-forward, LoKr factor 4."""
    shape = size.width, 4 * size.width, rows, device
    return [
        Contender(BARE, partial(_bare, *shape), counted=True),
        Contender(OURS_LAYER, partial(_ours, *shape), ours=True),
        Contender("lycoris, rebuilding W", partial(_lycoris, *shape, bypass=False)),
        Contender("lycoris, bypass", partial(_lycoris, *shape, bypass=True)),
    ]


def _linear(inner: int, outer: int, device: str) -> nn.Linear:
    return nn.Linear(inner, outer, device=device, dtype=torch.bfloat16).requires_grad_(False)


def _pass(layer: nn.Module, inner: int, outer: int, rows: int, device: str) -> Run:
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x, of_y = torch.randn(1, rows, inner, **kind), torch.randn(1, rows, outer, **kind)

    def run() -> None:
        given = x.detach().requires_grad_()
        layer(given).backward(of_y)
        layer.zero_grad()

    return run


def _bare(inner: int, outer: int, rows: int, device: str) -> Run:
    return _pass(_linear(inner, outer, device), inner, outer, rows, device)


def _ours(inner: int, outer: int, rows: int, device: str) -> Run:
    delta = LoKr(inner, outer, FACTOR, dtype=torch.bfloat16, device=device)
    nn.init.normal_(delta.lokr_w1)
    nn.init.normal_(delta.lokr_w2, std=0.01)
    return _pass(AdaptedLinear(_linear(inner, outer, device), delta), inner, outer, rows, device)


def _lycoris(inner: int, outer: int, rows: int, device: str, *, bypass: bool) -> Run:
    from lycoris.modules.lokr import LokrModule

    options = {"lora_dim": 10000, "alpha": 1, "factor": FACTOR, "full_matrix": True, "bypass_mode": bypass}
    linear = _linear(inner, outer, device)
    made = LokrModule("layer", linear, 1.0, **options).to(device, torch.bfloat16)
    made.apply_to()
    made.requires_grad_(True)

    class Layer(nn.Module):
        """lycoris replaces the linear's `forward`; its own parameters are its module's."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.delta = linear, made

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x)
            return out

    return _pass(Layer(), inner, outer, rows, device)
