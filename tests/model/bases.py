"""The tiny transformer frozen in each kind of base, and an adapter on it that matters."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model.fused_attention import fuse_attention
from libreflux.model.int8 import quantise_model
from libreflux.model.w8a8 import quantise_activations
from tiny import tiny_transformer


def based(base: str) -> FluxTransformer2DModel:
    transformer = tiny_transformer(seed=4).requires_grad_(False)
    fuse_attention(transformer)
    nn.Module.to(transformer, torch.float32 if base == "fp32" else torch.bfloat16)
    if base in ("int8", "w8a8"):
        quantise_model(transformer)
    if base == "w8a8":
        quantise_activations(transformer, "int8")
    return transformer


def adapted(transformer: FluxTransformer2DModel, layers: str = "**") -> Adapter:
    adapter = attach(transformer, resolve(linear_shapes(transformer), [Target(layers=layers, factor=4)]), init="ones")
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapter
