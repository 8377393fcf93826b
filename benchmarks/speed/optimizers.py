"""One optimizer step for an adapter's parameters, beside torch's and bitsandbytes' AdamW."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.speed.sizes import Size, empty_network
from benchmarks.speed.theirs import RATE
from benchmarks.speed.timing import Contender, Run
from torch import nn

from libreflux.adapter.plan import plan
from libreflux.recipe import AdapterSpec, OptimizerSpec
from libreflux.training.optimizer import GENERATOR, AdamWBF16, make_optimizer

OURS_OPTIMIZER = "ours adamw_bf16"
BEFORE = "ours adamw_bf16, as it was"


def shapes(size: Size) -> list[tuple[int, int]]:
    """Of the adapter's parameters, in its order."""
    layers = plan(AdapterSpec.model_validate(size.adapter), empty_network(size)).layers
    return [shape for row in layers for shape in (row.w1, row.w2)]


def contenders(size: Size, device: str) -> list[Contender]:
    """Each with parameters and gradients of its own."""
    sizes = shapes(size)
    count = sum(rows * columns for rows, columns in sizes)
    adamw = partial(_torch, sizes, device)
    return [
        Contender(OURS_OPTIMIZER, partial(_ours, sizes, device, "adamw_bf16"), ours=True, bytes=12.0 * count),
        Contender(BEFORE, partial(_ours, sizes, device, "adamw_bf16", GENERATOR), ours=True, bytes=12.0 * count),
        Contender("ours adamw", partial(_ours, sizes, device, "adamw"), ours=True, bytes=16.0 * count),
        Contender("torch AdamW, fp32", partial(adamw, torch.float32, "torch"), bytes=20.0 * count),
        Contender("torch AdamW, fp32, fused", partial(adamw, torch.float32, "fused"), bytes=16.0 * count),
        Contender("torch AdamW, bf16, fused", partial(adamw, torch.bfloat16, "fused"), bytes=8.0 * count),
        Contender("bitsandbytes AdamW8bit", partial(adamw, torch.float32, "8bit"), bytes=12.0 * count, counted=False),
    ]


def _parameters(sizes: list[tuple[int, int]], device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in sizes]


def _ours(sizes: list[tuple[int, int]], device: str, kind: Any, rounding: int | None = None) -> Run:
    spec = OptimizerSpec(kind=kind, learning_rate=RATE)
    parameters = _parameters(sizes, device, torch.bfloat16 if kind == "adamw_bf16" else torch.float32)
    optimizer = make_optimizer(spec, ((f"layer.{number}", one) for number, one in enumerate(parameters)), 0)
    if rounding is not None and isinstance(optimizer, AdamWBF16):
        optimizer.rounding = rounding  # what a run goes on with that was begun before there was another
    gradient = torch.randn(sum(one.numel() for one in parameters), device=device)

    def step() -> None:
        optimizer.step(RATE, gradient)

    return step


def _torch(sizes: list[tuple[int, int]], device: str, dtype: torch.dtype, kind: str) -> Run:
    parameters = _parameters(sizes, device, dtype)
    for one in parameters:
        one.grad = torch.randn_like(one)
    optimizer: Any
    if kind == "8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=RATE)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=kind == "fused" or None)

    def step() -> None:
        optimizer.step()

    return step
