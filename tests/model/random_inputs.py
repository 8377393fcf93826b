"""Random weights, and the velocity that a transformer gives of random inputs."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.model.latents import image_ids
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity

IDS = image_ids(4, 6)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def run(transformer: nn.Module) -> Tensor:
    """The velocity of two samples of unequal prompts."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(length, 24, generator=generator) for length in (3, 7)]
    text = TextConditioning(tokens, torch.randn(2, 16, generator=generator))
    packed = torch.randn(2, len(IDS), 64, generator=generator)
    assert isinstance(transformer, FluxTransformer2DModel)
    return velocity(transformer, packed, torch.tensor([0.2, 0.7]), text, IDS)
