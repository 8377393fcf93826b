"""Down the ladder: Euler's steps, with a callback that may change what they walk with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.solve import Step, euler
from libreflux.sample.finite import check_latents
from libreflux.sample.guidance import GuidedVelocity

TENSORS = ("latents", "prompt_conditioning", "negative_conditioning")
"""What a callback may see, and put another in the place of."""


class Interruptible(Protocol):
    """What is asked after each step whether to go on."""

    interrupt: bool


@dataclass
class Job:
    """A call to the pipeline whose every value is checked.

    Attributes:
        field: the velocity.
        x: where to start, packed [B, N, 4C].
        sigmas: [steps + 1].
        rows, columns: of the latents.
        seeds: of the pictures.
        callback: called as (pipe, step's index, 1000 sigma, tensors); what it returns takes their place.
        tensors: the names in `TENSORS` that it wants.
    """

    field: GuidedVelocity
    x: Tensor
    sigmas: Tensor
    rows: int
    columns: int
    seeds: list[int]
    callback: Callable[..., dict[str, Any] | None] | None
    tensors: Sequence[str]


@torch.no_grad()
def walk(pipe: Interruptible, job: Job) -> Iterator[Step]:
    """The steps of `flow.solve.euler`; the last one is where the ladder ends, or where `pipe` was interrupted.

    Raises:
        NotFiniteError: the latents overflow or are NaN.
    """
    pipe.interrupt = False
    x = job.x
    for index in range(len(job.sigmas) - 1):
        # One step at a time: the next one starts from what the callback leaves.
        step = dataclasses.replace(next(euler(job.field, x, job.sigmas[index : index + 2])), index=index)
        if job.callback is not None:
            step = dataclasses.replace(step, x=_called_back(pipe, job, step))
        x = step.x
        if index in (0, len(job.sigmas) - 2):  # at the first, lest the others are computed for nothing
            check_latents(x, job.field)
        yield step
        if pipe.interrupt:
            return


def check_tensors(names: Iterable[str], where: str) -> None:
    """Raises RecipeError for a name that is not in `TENSORS`."""
    if unknown := sorted(set(names) - set(TENSORS)):
        raise RecipeError(f"no tensor is called {unknown[0]!r}", where=where, mend=f"use {', '.join(TENSORS)}")


def _called_back(pipe: Interruptible, job: Job, step: Step) -> Tensor:
    assert job.callback is not None
    at_hand = dict(zip(TENSORS, (step.x, job.field.positive, job.field.negative), strict=True))
    timestep = torch.tensor(1000 * step.sigma, device=step.x.device)
    put = job.callback(pipe, step.index, timestep, {name: at_hand[name] for name in job.tensors}) or {}
    check_tensors(put, "callback_on_step_end")
    x, job.field.positive, job.field.negative = ({**at_hand, **put}[name] for name in TENSORS)
    return x
