"""Distillation: the adapter learns to give in one pass, then in few steps, what the base gives under guidance in many.

The teacher is the frozen base itself with the adapter switched off, so that it costs no memory: one run bakes guidance
in, the merged model is the base of the next, and each such run halves the number of steps. All of it regresses
velocities; the real FLUX.1-schnell was made with an adversarial loss instead (Sauer et al. 2024, arXiv 2403.12015).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.adapter.files import Adapter
from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate
from libreflux.flow.schedule import ladder
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import DistilSpec

Field = Callable[[Tensor, Tensor], Tensor]
"""field(x [B, …], sigma [B]): dx/dsigma, [B, …]."""


def on_rungs(sigma: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Each sigma raised to the nearest rung of a sampler's ladder that is not below it.

    Args:
        sigma: [B] in (0, 1].
        steps: of the sampler; its rungs are `schedule.ladder`'s without the 0 at its end.
        shift: of the ladder.
    """
    rising = ladder(steps, shift)[:-1].flip(0).to(sigma)
    return rising[torch.searchsorted(rising, sigma)]


def chord(field: Field, x: Tensor, path: Tensor) -> Tensor:
    """The one velocity that leads in a single Euler step to where the field leads in several.

    (x' - x) / (sigma' - sigma): progressive distillation, Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2, for
    velocities.

    Args:
        field: the teacher's velocity.
        x: [B, …] at path[0], fp32.
        path: [K + 1, B], the sigmas that the field's K Euler steps visit.
    """
    end, wide = x, (-1, *[1] * (x.ndim - 1))
    for sigma, sigma_next in itertools.pairwise(path):
        end = end + (sigma_next - sigma).view(wide) * field(end, sigma)
    return (end - x) / (path[-1] - path[0]).view(wide)


def teacher_path(sigma: Tensor, spec: DistilSpec, shift: float = 1.0) -> Tensor:
    """[substeps + 1, B]: from each sigma, a rung of the student's ladder, along the teacher's finer one to the next."""
    assert spec.steps is not None
    fine = ladder(spec.steps * spec.substeps, shift).to(sigma)
    start = (fine[None, :] - sigma[:, None]).abs().argmin(dim=1)
    return fine[start[None, :] + torch.arange(spec.substeps + 1, device=sigma.device)[:, None]]


@torch.no_grad()
def distilled_target(
    transformer: FluxTransformer2DModel,
    adapter: Adapter,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    text: TextConditioning,
    empty: TextConditioning,
    spec: DistilSpec,
    *,
    shift: float = 1.0,
    guidance: float | None = None,
) -> Tensor:
    """What the student is to say at x_sigma: the base's guided velocity, or the chord of its guided steps.

    Guidance baked in: Meng et al. 2022 (arXiv 2210.03142), section 3.1, here for one guidance scale.

    Args:
        transformer: the network with `adapter` on it.
        adapter: the student's.
        latents: [B, C, h, w], x0.
        noise: [B, C, h, w].
        sigma: [B] fp32; rungs of the ladder (`on_rungs`) if `spec.steps` is set.
        text: B prompts.
        empty: the empty prompt, one.
        spec: the recipe's.
        shift: of the student's ladder.
        guidance: the embedded guidance of a base that has one.

    Returns:
        [B, h*w/4, 4C] packed, fp32.
    """
    ids = image_ids(latents.shape[-2], latents.shape[-1], device=latents.device)
    without = empty.index([0] * len(text))

    def field(x: Tensor, at: Tensor) -> Tensor:
        v = velocity(transformer, x, at, text, ids, guidance=guidance)
        if spec.guidance == 1:
            return v
        return cfg(v, velocity(transformer, x, at, without, ids, guidance=guidance), spec.guidance)

    x_sigma = pack(interpolate(latents, noise, sigma))
    with adapter.disabled():
        return field(x_sigma, sigma) if spec.steps is None else chord(field, x_sigma, teacher_path(sigma, spec, shift))
