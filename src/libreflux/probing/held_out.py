"""A model on held-out pictures: loss, calibration slope and what the prompt is worth, by noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.data.held_out import HeldOut
from libreflux.model.latents import image_ids, pack, unpack
from libreflux.model.numerics import pinned
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.probing.metrics.measures import Estimate, Moments, Velocity, loss, moments, prompt_gain, resampled, slope


@dataclass(frozen=True, eq=False)
class HeldOutTable:
    """One measurement of one model; every estimate is over the pictures, at each sigma.

    Attributes:
        pictures: how many.
        sigmas: the noise levels.
        loss: mean squared error under each picture's own caption.
        null_loss: under the empty prompt.
        slope: calibration slope under the captions; 1 for an optimal velocity.
        null_slope: under the empty prompt.
        prompt_gain: null_loss − loss; zero for a model that does not read its prompt.
    """

    pictures: int
    sigmas: tuple[float, ...]
    loss: Estimate
    null_loss: Estimate
    slope: Estimate
    null_slope: Estimate
    prompt_gain: Estimate

    def as_json(self) -> dict[str, Any]:
        """Plain values, one list per column, in the order of `sigmas`; what is not finite is null."""
        columns: dict[str, Any] = {"pictures": self.pictures, "sigmas": list(self.sigmas)}
        for name in ("loss", "null_loss", "slope", "null_slope", "prompt_gain"):
            found: Estimate = getattr(self, name)
            for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
                columns[name + suffix] = [value if math.isfinite(value) else None for value in values.tolist()]
        return columns

    def line(self) -> str:
        """The means over sigma and the conditional slopes, for a terminal."""
        slopes = " ".join(f"{value:.3f}" for value in self.slope.value)
        levels = " ".join(f"{sigma:g}" for sigma in self.sigmas)
        return (
            f"held-out loss {self.loss.value.mean():.4f}, without prompt {self.null_loss.value.mean():.4f}, "
            f"slope {slopes} at sigma {levels}"
        )


def measure_held_out(
    transformer: FluxTransformer2DModel,
    held_out: HeldOut,
    *,
    sigmas: Sequence[float],
    batch: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> HeldOutTable:
    """Measures a transformer as it stands, adapter included; it is left as it was.

    Two forward passes, with the caption and without, for each picture and sigma. Noise is keyed by (seed, picture,
    sigma): every step, run and model sees the same.

    Args:
        transformer: the network, where its weights are.
        held_out: the pictures.
        sigmas: noise levels in (0, 1).
        batch: pictures per forward pass; changes nothing but the last bits.
        guidance: the value for a network with a guidance embedding, None for one without.
        seed: of noise and bootstrap.
        on_batch: told how many pictures are done.

    Raises:
        ModelError: guidance is given to a network without guidance embedding, or is missing for one with it.
        DataError: a damaged cache.
    """
    captioned: list[Moments] = []
    unprompted: list[Moments] = []
    done, null = 0, held_out.empty_prompt()
    with _at_rest(transformer):
        for part in held_out.batches(batch):
            latents = part.latents.to(transformer.device)
            for found, text in ((captioned, part.text), (unprompted, null.repeat(len(part)))):
                field = model_velocity(transformer, text, guidance=guidance)
                found.append(moments(field, latents, part.sample_ids, sigmas, seed=seed))
            done += len(part)
            on_batch(done)
    conditional, unconditional = Moments.cat(captioned), Moments.cat(unprompted)
    weights = resampled(len(conditional), seed=seed)
    return HeldOutTable(
        pictures=len(conditional),
        sigmas=conditional.sigmas,
        loss=loss(conditional, weights),
        null_loss=loss(unconditional, weights),
        slope=slope(conditional, weights),
        null_slope=slope(unconditional, weights),
        prompt_gain=prompt_gain(conditional, unconditional, weights),
    )


def model_velocity(
    transformer: FluxTransformer2DModel, text: TextConditioning, *, guidance: float | None = None
) -> Velocity:
    """A model's velocity on latents [B, C, h, w] under B prompts; `guidance` as of `model.velocity.velocity`."""

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        ids = image_ids(height, width, device=x.device)
        return unpack(velocity(transformer, pack(x), sigma, text, ids, guidance=guidance), height, width)

    return field


@contextmanager
def _at_rest(transformer: FluxTransformer2DModel) -> Iterator[None]:
    was = transformer.training
    transformer.eval()
    try:
        with torch.no_grad(), pinned(transformer.device):
            yield
    finally:
        transformer.train(was)
