"""From noise to a picture: the loop over the noise levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from libreflux.flow.solve import Step, at_least_fp32, euler_step

StepVelocity = Callable[[Tensor, float, int], Tensor]
"""(x, sigma, index of the step) → dx/dsigma, such as a `GuidedVelocity`."""


@torch.no_grad()
def denoise(
    velocity_at: StepVelocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    on_step_end: Callable[[Step], Tensor] | None = None,
    check: Callable[[Tensor], None] = lambda latents: None,
) -> Iterator[Step]:
    """Follows a velocity from noise to a picture, by Euler's method.

    Args:
        velocity_at: the velocity, with prompts and guidance.
        noise: packed [B, N, 4C].
        sigmas: [steps + 1], falling to 0, see `draw_settings.resolve`.
        on_step_end: called after each step; the latents that it returns take the place of the step's.
        check: called with the latents of the first and of the last step; raises if they are not finite.

    Yields:
        Each step. The last one holds the pictures' latents.
    """
    x, last = noise, len(sigmas) - 2
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = at_least_fp32(x)
        velocity = velocity_at(x, sigma, index)
        x = euler_step(x, velocity, sigma, sigma_next)
        step = Step(index=index, sigma=sigma, sigma_next=sigma_next, x=x, velocity=velocity)
        if on_step_end is not None:
            x = on_step_end(step)
            step = dataclasses.replace(step, x=x)
        if index in (0, last):  # at the first too, or the other steps would be computed for nothing
            check(x)
        yield step
