"""Inference sigma ladders and their shifts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23); s > 1 spends more steps on noise."""
    if not shift > 0:
        raise ValueError(f"shift is {shift}, wanted more than 0")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def ladder(steps: int, shift: float = 1.0) -> Tensor:
    """The sigmas that a sampler visits: [steps + 1] fp32, from 1 down to 1/steps evenly, shifted, then 0.

    Args:
        steps: number of velocity evaluations, at least 1.
        shift: see `shift_sigmas`; 1 leaves the ladder even.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, wanted at least 1")
    even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(even, shift), torch.zeros(1, dtype=torch.float64)]).float()


DEV_SHIFT = ((256, 0.5), (4096, 1.15))
"""Of FLUX.1-dev's shift: two numbers of image tokens, and mu there."""


def shift_for_tokens(tokens: int) -> float:
    """FLUX.1-dev's shift e^mu for this many image tokens: mu is linear, 0.5 at 256 tokens and 1.15 at 4096."""
    (low, least), (high, most) = DEV_SHIFT
    slope = (most - least) / (high - low)
    return math.exp(least + slope * (tokens - low))
