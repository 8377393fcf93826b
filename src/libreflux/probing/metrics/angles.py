"""How far two hidden states are from one another: the angle between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """arccos(cos(x, y)) / pi of vectors in the last dimension, in [0, 1]: Gromov et al. 2024 (arXiv:2403.17887), eq. 6.

    0 for the same direction, 1/2 for orthogonal ones, 1 for opposite ones. By 2 atan2(|u - v|, |u + v|) of the unit
    vectors u and v (Kahan 2006), since arccos loses half of the digits of small angles. A vector of zeros is orthogonal
    to all but another one, from which it has the distance 0.

    Args:
        x, y: [..., D].

    Returns:
        [...], fp32.
    """
    u, v = (_unit(each.to(torch.float32)) for each in (x, y))
    across, along = torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1)
    return 2 / math.pi * torch.atan2(across, along)


def centred(tokens: Tensor) -> Tensor:
    """Tokens [..., T, D] less their mean: without the few channels that are large and alike in all tokens."""
    wide = tokens.to(torch.float32)
    return wide - wide.mean(dim=-2, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    largest = vectors.abs().amax(dim=-1, keepdim=True)  # squares of fp32 would overflow, or vanish
    scaled = vectors / torch.where(largest > 0, largest, 1)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
