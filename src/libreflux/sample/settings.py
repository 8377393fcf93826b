"""The numbers of a call: defaults resolved from the model's facts, every value checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.schedule import ladder, shift_for_tokens, shift_sigmas
from libreflux.model.facts import MOST_STEPS, Facts
from libreflux.model.latents import MOST_SIDE
from libreflux.printing import counted

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST_PIXELS = 2**26
"""Of one picture: 8192 x 8192, 262,144 tokens. A picture's own record, too, may name no more."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a call draws.

    Attributes:
        steps: number of Euler steps.
        sigmas: [steps + 1] fp32, falling to 0, the shift applied.
        scale: the guidance scale.
        guided: the steps that are guided; empty at a scale of 1 or below.
        embedded: the embedded guidance of a guidance-distilled model, else what was asked for (None).
    """

    steps: int
    sigmas: Tensor
    scale: float
    guided: range
    embedded: float | None


def resolve(
    facts: Facts,
    image_tokens: int,
    *,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    no_cfg_until: int = 0,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
    embedded_guidance: float | None = None,
) -> Settings:
    """Settings from checked values (see `check_values`); None is the model's own.

    Raises:
        RecipeError: sigmas and a number of steps that do not agree, or an interval without a step.
    """
    shift = shift_for_tokens(image_tokens) if facts.shift is None else facts.shift
    if sigmas is None:
        steps = facts.steps if num_inference_steps is None else num_inference_steps
        values = ladder(steps, shift)
    else:
        steps = len(sigmas)
        if num_inference_steps not in (None, steps):
            raise RecipeError(
                f"{counted(steps, 'sigma')} for {counted(num_inference_steps, 'step')}",
                mend="leave num_inference_steps out",
            )
        own = shift_sigmas(torch.tensor(list(sigmas), dtype=torch.float64), shift)
        values = torch.cat([own, torch.zeros(1, dtype=torch.float64)]).float()
    own_scale = 1.0 if facts.guidance_embeds else facts.guidance
    scale = own_scale if guidance_scale is None else float(guidance_scale)
    guided = range(0)
    if scale > 1:
        guided = guided_steps(steps, no_cfg_until, guidance_start, guidance_stop)
    embedded = facts.guidance if facts.guidance_embeds and embedded_guidance is None else embedded_guidance
    return Settings(steps=steps, sigmas=values, scale=scale, guided=guided, embedded=embedded)


def guided_steps(steps: int, no_cfg_until: int = 0, start: float = 0.0, stop: float = 1.0) -> range:
    """The steps i of `steps` with start <= i / steps < stop; `no_cfg_until` = k is start = k / steps.

    Raises:
        RecipeError: both forms of the start were given, or no step is left to guide: that would be a guidance of 1.
    """
    if no_cfg_until and start:
        raise RecipeError("both no_cfg_until and guidance_start were given", mend="pass one of them")
    first = max(no_cfg_until, math.ceil(start * steps - 1e-9))  # 1e-9: 0.1 * 30 is a little more than 3
    found = range(first, math.ceil(stop * steps - 1e-9))
    if not found and no_cfg_until >= steps:
        what = f"leaves no step of {steps} guided"
        raise RecipeError(what, where="no_cfg_until", mend="use fewer, or guidance 1 instead")
    if not found:
        raise RecipeError(
            f"no step of {steps} is guided from {max(start, no_cfg_until / steps):g} to {stop:g}",
            mend="widen the interval, or use guidance 1",
        )
    return found


def check_values(given: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raises RecipeError for a value out of range; None is not checked.

    Args:
        given: some arguments of `LibreFluxPipeline.__call__`.
        names: what the user calls them, if otherwise.
    """
    for name, value in given.items():
        good, mend = _CHECKS[name]
        if value is not None and not good(value):
            raise RecipeError(f"cannot be {value!r}", where=(names or {}).get(name, name), mend=mend)
    width, height = (given.get(name) for name in ("width", "height"))
    if width and height and width * height > MOST_PIXELS:
        what = f"{width} x {height} pixels are more than {MOST_PIXELS / 1e6:.0f} million"
        raise RecipeError(what, where=(names or {}).get("width", "width"), mend="draw a smaller picture")
    start, stop = given.get("guidance_start", 0.0), given.get("guidance_stop", 1.0)
    if start >= stop:
        name = (names or {}).get("guidance_start", "guidance_start")
        raise RecipeError(f"{start:g} is not below the stop, {stop:g}", where=name, mend="start before the stop")


def _is_number(value: Any) -> bool:
    """Whether it is one number, Python's, numpy's or torch's: no text, and no truth value."""
    if isinstance(value, bool | str | bytes):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _is_whole(value: Any) -> bool:
    if not _is_number(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 16 <= value <= MOST_SIDE and value % 16 == 0


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_scale(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_whole(value) and value >= least


def _falls(sigmas: Any) -> bool:
    values = [float(sigma) if _is_number(sigma) else math.nan for sigma in sigmas]
    return 0 < len(values) <= MOST_STEPS and all(0 < v <= 1 for v in values) and all(a > b for a, b in pairwise(values))


def _is_switch(value: Any) -> bool:
    return value is True or value is False


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "height": (_is_size, f"use a multiple of 16, at most {MOST_SIDE}"),
    "width": (_is_size, f"use a multiple of 16, at most {MOST_SIDE}"),
    "num_inference_steps": (lambda steps: _is_whole(steps) and 1 <= steps <= MOST_STEPS, f"use 1 to {MOST_STEPS}"),
    "sigmas": (_falls, "use falling numbers in (0, 1]; the last one, 0, is added"),
    "guidance_scale": (_is_scale, "use 0 or more; 1 is no guidance"),
    "embedded_guidance": (_is_scale, "use 0 or more"),
    "no_cfg_until": (_is_count(0), "use 0 or more steps"),
    "guidance_start": (_is_fraction, "use a fraction of the steps, 0 to 1"),
    "guidance_stop": (_is_fraction, "use a fraction of the steps, 0 to 1"),
    "guidance_rescale": (_is_fraction, "use 0 to 1; 0 is none"),
    "batch_cfg": (lambda how: _is_switch(how) or how == "auto", 'use True, False or "auto"'),
    "num_images_per_prompt": (_is_count(1), "use 1 or more"),
    "output_type": (OUTPUT_TYPES.__contains__, f"use one of {', '.join(OUTPUT_TYPES)}"),
    "tile": (_is_switch, "use True, False or None"),
    "return_dict": (_is_switch, "use True or False"),
    "max_sequence_length": (_is_count(0), "use a count of tokens"),
}
NUMBERS = tuple(_CHECKS)
"""Every argument that `check_values` knows."""
RESOLVED = (
    "num_inference_steps",
    "sigmas",
    "guidance_scale",
    "no_cfg_until",
    "guidance_start",
    "guidance_stop",
    "embedded_guidance",
)
"""The arguments that `resolve` makes settings of."""
