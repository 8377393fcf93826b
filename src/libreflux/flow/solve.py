"""Euler's method for dx/dsigma = v(x, sigma)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


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


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Every step of Euler's method along the sigmas.

    Args:
        velocity: takes the state [B, …] and sigma (a float, exact in fp32), returns dx/dsigma of the same shape.
        x: the state at sigmas[0], [B, …]; accumulated in fp32 (fp64 stays fp64) whatever dtype the velocity has.
        sigmas: [steps + 1], falling or rising, as from `schedule.ladder`.
    Yields:
        `steps` Steps; the last one holds the state at sigmas[-1].
    """
    x = at_least_fp32(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        v = velocity(x, sigma)
        x = euler_step(x, v, sigma, sigma_next)
        yield Step(index=index, sigma=sigma, sigma_next=sigma_next, x=x, velocity=v)
