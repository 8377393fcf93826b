"""How a picture is drawn: the numbers of a request, with the model's own where none were given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.schedule import ladder, shift_sigmas
from libreflux.model.facts import Facts
from libreflux.printing import counted
from libreflux.sample.request import DrawRequest
from libreflux.sample.rules import GuidanceRule
from libreflux.values import is_guided


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How a call draws.

    Attributes:
        steps: number of Euler steps.
        sigmas: [steps + 1] fp32, falling to 0, the shift applied.
        scale: the guidance scale.
        guided_steps: the steps that are guided; empty at a scale of 0 or 1.
        embedded: the embedded guidance of a guidance-distilled model, else what was asked for (None).
        rule: of guided steps; plain CFG at a scale of 0 or 1.
    """

    steps: int
    sigmas: Tensor
    scale: float
    guided_steps: range
    embedded: float | None
    rule: GuidanceRule


def resolve(facts: Facts, image_tokens: int, request: DrawRequest) -> DrawSettings:
    """Settings from checked values (see `checks`); None is the model's own.

    Args:
        facts: the model's.
        image_tokens: of one picture, which dev's shift depends on.
        request: the call's.

    Raises:
        RecipeError: sigmas and a number of steps that do not agree, or an interval without a step.
    """
    shift = facts.shift_at(image_tokens)
    if request.sigmas is None:
        steps = facts.steps if request.num_inference_steps is None else request.num_inference_steps
        sigmas = ladder(steps, shift)
    else:
        steps = len(request.sigmas)
        if request.num_inference_steps not in (None, steps):
            what = f"{counted(steps, 'sigma')} for {counted(request.num_inference_steps, 'step')}"
            raise RecipeError(what, hint="leave num_inference_steps out")
        own = shift_sigmas(torch.tensor(list(request.sigmas), dtype=torch.float64), shift)
        sigmas = torch.cat([own, torch.zeros(1, dtype=torch.float64)]).float()
    scale = facts.cfg_scale if request.guidance_scale is None else float(request.guidance_scale)
    if request.first_steps is not None:
        request.first_steps.check_steps(steps)
    guided, rule = range(0), GuidanceRule()
    if is_guided(scale):
        rule = request.guidance_rule
        rule.check_steps(steps)
        guided = guided_steps(steps, request.no_cfg_until, request.guidance_start, request.guidance_stop)
    embedded = facts.embedded_guidance if request.embedded_guidance is None else request.embedded_guidance
    return DrawSettings(steps=steps, sigmas=sigmas, scale=scale, guided_steps=guided, embedded=embedded, rule=rule)


def guided_steps(steps: int, no_cfg_until: int = 0, start: float = 0.0, stop: float = 1.0) -> range:
    """The steps i of `steps` with start <= i / steps < stop; `no_cfg_until` = k is start = k / steps.

    Raises:
        RecipeError: both forms of the start were given, or no step is left to guide: that would be a guidance of 1.
    """
    if no_cfg_until and start:
        raise RecipeError("both no_cfg_until and guidance_start were given", hint="pass one of them")
    first = max(no_cfg_until, math.ceil(start * steps - 1e-9))  # 1e-9: 0.1 * 30 is a little more than 3
    found = range(first, math.ceil(stop * steps - 1e-9))
    if not found and no_cfg_until >= steps:
        what = f"leaves no step of {steps} guided"
        raise RecipeError(what, where="no_cfg_until", hint="use fewer, or guidance 1 instead")
    if not found:
        raise RecipeError(
            f"no step of {steps} is guided from {max(start, no_cfg_until / steps):g} to {stop:g}",
            hint="widen the interval, or use guidance 1",
        )
    return found
