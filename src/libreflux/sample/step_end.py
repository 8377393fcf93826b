"""The callback that diffusers calls `callback_on_step_end`: it sees tensors after each step, and may replace them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.solve import Step
from libreflux.sample.guidance import GuidedVelocity

TENSORS = ("latents", "prompt_conditioning", "negative_conditioning")
"""What a callback may see and replace."""

StepEndCallback = Callable[..., dict[str, Any] | None]


def check_tensors(names: Iterable[str], where: str) -> None:
    """Raises RecipeError for a name that is not in `TENSORS`."""
    if unknown := sorted(set(names) - set(TENSORS)):
        raise RecipeError(f"no tensor is called {unknown[0]!r}", where=where, hint=f"use {', '.join(TENSORS)}")


def on_step_end(
    pipe: object, guided: GuidedVelocity, callback: StepEndCallback | None, names: Sequence[str]
) -> Callable[[Step], Tensor] | None:
    """A callback of the user's as `denoise` calls one; None without.

    Args:
        pipe: what the callback gets first.
        guided: whose prompts it may replace.
        callback: called as (pipe, step's index, 1000 sigma, tensors).
        names: of the tensors that it gets.
    """
    if callback is None:
        return None

    def replaced(step: Step) -> Tensor:
        tensors = dict(zip(TENSORS, (step.x, guided.positive, guided.negative), strict=True))
        timestep = torch.tensor(1000 * step.sigma, device=step.x.device)
        returned = callback(pipe, step.index, timestep, {name: tensors[name] for name in names}) or {}
        check_tensors(returned, "callback_on_step_end")
        latents, guided.positive, guided.negative = ({**tensors, **returned}[name] for name in TENSORS)
        return latents

    return replaced
