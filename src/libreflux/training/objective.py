"""What training minimises: flow matching, staying with the base's velocity, or distillation. In fp32, by picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux import seeding
from libreflux.adapter.adapter import Adapter
from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate, velocity_target
from libreflux.flow.schedule import ladder
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.recipe import DistilSpec

Field = Callable[[Tensor, Tensor], Tensor]
"""field(x [B, …], sigma [B]): dx/dsigma, [B, …]."""


@dataclass(frozen=True, eq=False)
class NoisedBatch:
    """B pictures with noise, as one pass of training sees them.

    Attributes:
        latents: x0 [B, C, h, w], normalised as the transformer expects them.
        noise: [B, C, h, w], standard normal.
        sigma: [B] fp32 in (0, 1), or rungs of a ladder for `distilled_target`.
        text: B prompts; an empty prompt where the caption was dropped.
        guidance: the value for a network with a guidance embedding, None for one without.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    text: TextConditioning
    guidance: float | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def x_sigma(self) -> Tensor:
        """The noised latents, packed [B, h*w/4, 4C]."""
        return pack(interpolate(self.latents, self.noise, self.sigma))

    @property
    def target(self) -> Tensor:
        """noise - x0, packed [B, h*w/4, 4C]."""
        return pack(velocity_target(self.latents, self.noise))

    def index(self, rows: Sequence[int]) -> NoisedBatch:
        """The pictures at these positions."""
        picked = list(rows)
        text = self.text.index(picked)
        return NoisedBatch(self.latents[picked], self.noise[picked], self.sigma[picked], text, self.guidance)

    def velocity(
        self, transformer: FluxTransformer2DModel, x: Tensor, sigma: Tensor, text: TextConditioning | None = None
    ) -> Tensor:
        """The network's velocity at x [B, h*w/4, 4C] and sigma [B], under these prompts or others."""
        ids = image_ids(self.latents.shape[-2], self.latents.shape[-1], device=self.latents.device)
        prompts = self.text if text is None else text
        return velocity(transformer, x, sigma, prompts, ids, guidance=self.guidance)


@dataclass(frozen=True)
class Learned:
    """What one pass gave, without gradient.

    Attributes:
        losses: [B] fp32, what was minimised: the objective's loss and what is weighed beside it.
        told: by name, [B] fp32, the parts of it; nothing where there are none.
    """

    losses: Tensor
    told: Mapping[str, Tensor]

    def table(self) -> Tensor:
        """[B, 1 + K]: of each picture the loss, then what is told of it, in the order of `told`."""
        return torch.stack([self.losses, *self.told.values()], dim=1)


def keyed_noise(shape: Sequence[int], seed: int, *index: int | str) -> Tensor:
    """Standard normal noise, fp32 on the CPU, a function of (seed, "noise", index…) alone.

    Args:
        shape: of one sample, e.g. [C, h, w].
        seed: the recipe's seed.
        index: what tells this noise from any other of the run, e.g. sample id, step and slot.
    """
    return torch.randn(tuple(shape), generator=seeding.generator(seed, "noise", *index), dtype=torch.float32)


def flow_matching_loss(
    transformer: FluxTransformer2DModel, batch: NoisedBatch, *, target: Tensor | None = None
) -> Tensor:
    """|velocity(x_sigma, sigma, text) - (noise - x0)|², mean over the latent numbers of each picture.

    Lipman et al. 2022 (arXiv 2210.02747), eq. 23 with sigma_min = 0 and time running from data (sigma 0) to noise
    (sigma 1), the convention of FLUX. Path, target and difference are fp32; only the transformer runs in less.

    Args:
        transformer: the network, adapted or not.
        batch: the pictures.
        target: [B, h*w/4, 4C] packed, to take the place of noise - x0; see `regularised_target`.

    Returns:
        [B] fp32. Weigh it by the pictures of the whole optimizer step; a short unit then counts for what it holds.

    Raises:
        ModelError: guidance is given to a network without guidance embedding, or is missing for one with it.
    """
    target = batch.target if target is None else target
    # No autocast: the network runs in the dtype of its weights, as it does when it draws. On a bf16 base autocast gave
    # the same loss to the bit, and the same gradient error against fp32 (0.7 %).
    predicted = batch.velocity(transformer, batch.x_sigma, batch.sigma)
    return (predicted.to(target.dtype) - target).square().mean(dim=(1, 2))


def regularised_target(
    transformer: FluxTransformer2DModel, adapter: Adapter, batch: NoisedBatch, regularised: Sequence[bool]
) -> Tensor:
    """noise - x0, and for the regularised pictures the velocity that the base gives at the same x_sigma, sigma, text.

    Prior preservation (Ruiz et al. 2022, arXiv 2208.12242) without drawn class pictures: what is kept is the
    base's own velocity (Li and Hoiem 2016, arXiv 1606.09282). The loss against it and its gradient are zero while the
    adapter does nothing. Only the regularised pictures pay for the second pass, which keeps no graph.

    Args:
        transformer: the network with `adapter` on it.
        adapter: what is trained, and whatever else is on: with it off the network is the base.
        batch: the pictures.
        regularised: B flags.

    Returns:
        [B, h*w/4, 4C] packed, fp32, without gradient.
    """
    target = batch.target
    if which := [index for index, flag in enumerate(regularised) if flag]:
        kept = batch.index(which)
        with torch.no_grad(), adapter.disabled():
            target[which] = kept.velocity(transformer, kept.x_sigma, kept.sigma).to(target.dtype)
    return target


@torch.no_grad()
def distilled_target(
    transformer: FluxTransformer2DModel,
    adapter: Adapter,
    batch: NoisedBatch,
    empty: TextConditioning,
    spec: DistilSpec,
    *,
    shift: float = 1.0,
) -> Tensor:
    """Distillation: the base's velocity under guidance, or the chord of its guided steps, at x_sigma.

    The teacher is the frozen base itself with the adapter switched off, so that it costs no memory: one run bakes
    guidance in (Meng et al. 2022, arXiv 2210.03142, section 3.1, here for one guidance scale), the merged model is the
    base of the next, and each such run halves the number of steps. All of it regresses velocities; the real
    FLUX.1-schnell was made with an adversarial loss instead (Sauer et al. 2024, arXiv 2403.12015): see
    `training.adversary`.

    Args:
        transformer: the network with `adapter` on it.
        adapter: the student's, and whatever else is on: with it off the network is the teacher.
        batch: the pictures; their sigmas are rungs of the ladder (`on_rungs`) if `spec.steps` is set.
        empty: the empty prompt, one.
        spec: the recipe's.
        shift: of the student's ladder.

    Returns:
        [B, h*w/4, 4C] packed, fp32.
    """
    without = empty.index([0] * len(batch))

    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        v = batch.velocity(transformer, x, sigma)
        return v if spec.guidance == 1 else cfg(v, batch.velocity(transformer, x, sigma, without), spec.guidance)

    with adapter.disabled():
        if spec.steps is None:
            return teacher(batch.x_sigma, batch.sigma)
        return chord(teacher, batch.x_sigma, teacher_path(batch.sigma, spec.steps, spec.substeps, shift))


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


def teacher_path(sigma: Tensor, steps: int, substeps: int, shift: float = 1.0) -> Tensor:
    """[substeps + 1, B]: from each sigma, a rung of the student's ladder, along the teacher's finer one to the next."""
    fine = ladder(steps * substeps, shift).to(sigma)
    start = (fine[None, :] - sigma[:, None]).abs().argmin(dim=1)
    return fine[start[None, :] + torch.arange(substeps + 1, device=sigma.device)[:, None]]
