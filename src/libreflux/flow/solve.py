"""A step of Euler's method for dx/dsigma = v(x, sigma)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        index: 0 for the first step.
        sigma: where the velocity was evaluated.
        sigma_next: where the step arrived.
        x: the state at `sigma_next`, [B, …], at least fp32; x - sigma_next * velocity is the picture it points to.
        velocity: the velocity at `sigma`, as it was computed.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    velocity: Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """The state that a solver accumulates: fp32, or fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x' = x + (sigma' - sigma) v, first order; in x's dtype.

    Args:
        x: the state at `sigma`, [B, …], see `at_least_fp32`.
        velocity: dx/dsigma there, of the same shape and any dtype.
        sigma, sigma_next: where the step begins and ends.
    """
    return x + (sigma_next - sigma) * velocity.to(x.dtype)
