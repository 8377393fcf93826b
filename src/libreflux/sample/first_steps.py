"""The first steps of a picture by one model, the rest by another: a base's choice, a student's speed."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.errors import OptionError
from libreflux.model.text import TextConditioning
from libreflux.sample.denoise import StepVelocity
from libreflux.sample.encoding import matched
from libreflux.sample.guidance import GuidedVelocity
from libreflux.values import is_guided


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """Who draws the first steps (Gandikota and Bau 2025, arXiv 2503.10637: the base draws the first one).

    The ladder of noise levels is the call's own, and so are the noise and the VAE.

    Attributes:
        transformer: the other model's.
        steps: how many steps are its; 0 is none.
        positive: P prompts, encoded as the other model wants them.
        negative: one negative prompt or P of them; read only where `scale` is guided, neither 0 nor 1.
        scale: its own scale of classifier-free guidance.
        embedded_guidance: see `model.velocity`.

    Raises:
        OptionError: a guided scale without a negative prompt.
    """

    transformer: FluxTransformer2DModel
    steps: int
    positive: TextConditioning
    negative: TextConditioning | None = None
    scale: float = 1.0
    embedded_guidance: float | None = None

    def __post_init__(self) -> None:
        if is_guided(self.scale) and self.negative is None:
            hint = "give the empty prompt, encoded, or scale 1"
            raise OptionError(f"guidance {self.scale:g} needs a negative prompt", "first_steps", hint=hint)

    def check_steps(self, steps: int) -> None:
        """Raises OptionError where no step of so many is left to the model itself."""
        if not 0 <= self.steps < steps:
            hint = f"use at most {steps - 1}" if steps > 1 else "use more steps"
            raise OptionError(f"{self.steps} of {steps} steps leave none to the model", "first_steps", hint=hint)


@dataclass(frozen=True)
class HandedOver:
    """The velocity of one model, and from a step on that of another."""

    first: StepVelocity
    steps: int
    then: StepVelocity

    def __call__(self, x: Tensor, sigma: float, step: int) -> Tensor:
        """See `denoise`."""
        return (self.first if step < self.steps else self.then)(x, sigma, step)


def handed_over(first: FirstSteps | None, then: GuidedVelocity, copies: int) -> StepVelocity:
    """What `denoise` follows: `then` alone, or after the first steps.

    Args:
        first: None is no other model.
        then: the model's own velocity.
        copies: pictures for each prompt.
    """
    if first is None or not first.steps:
        return then
    device, negative = then.image_ids.device, None
    if is_guided(first.scale) and first.negative is not None:
        negative = matched(first.negative, len(first.positive)).repeat(copies).to(device)
    opening = GuidedVelocity(
        transformer=first.transformer,
        positive=first.positive.repeat(copies).to(device),
        negative=negative,
        image_ids=then.image_ids,
        scale=first.scale,
        embedded_guidance=first.embedded_guidance,
    )
    return HandedOver(opening, first.steps, then)
