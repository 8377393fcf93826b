"""Solvers of dx/dsigma = v(x, sigma) over a velocity callable. They yield their steps; the last one holds the end."""

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
        velocity: the velocity at `sigma`, as the callable returned it.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    velocity: Tensor


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method: x' = x + (sigma' - sigma) v(x, sigma), first order.

    Args:
        velocity: takes the state [B, …] and sigma (a float, exact in fp32), returns dx/dsigma of the same shape.
        x: the state at sigmas[0], [B, …]; accumulated in fp32 (fp64 stays fp64) whatever dtype the velocity has.
        sigmas: [steps + 1], falling or rising, as from `schedule.ladder`.

    Yields:
        `steps` Steps; the last one holds the state at sigmas[-1].
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    values = sigmas.tolist()
    for index, (sigma, sigma_next) in enumerate(pairwise(values)):
        v = velocity(x, sigma)
        x = x + (sigma_next - sigma) * v.to(x.dtype)
        yield Step(index=index, sigma=sigma, sigma_next=sigma_next, x=x, velocity=v)
