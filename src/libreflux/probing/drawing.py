"""Pictures drawn for measuring: batches along an Euler ladder, every picture a function of its prompt and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from libreflux.flow.solve import Step
from libreflux.model.latents import pack, unpack
from libreflux.sample.denoise import StepVelocity, denoise
from libreflux.values import is_guided

FORMULA = 1
"""Raised when the same model and `PictureBatch` come to give other pictures, not only other last bits."""


@dataclass(frozen=True)
class PictureBatch:
    """N pictures to draw.

    Attributes:
        prompts, seeds: of each picture.
        guidance: classifier-free guidance scale; 0 and 1 are none.
        steps: of the ladder.
        negatives: what stands in the empty prompt's place, one each; () is the empty prompt.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    steps: int
    negatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts) or len(self.negatives) not in (0, len(self.prompts)):
            raise ValueError(f"{len(self.prompts)} prompts, {len(self.seeds)} seeds, {len(self.negatives)} negatives")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def passes(self) -> int:
        """Samples that go through the model."""
        return len(self) * self.steps * (2 if is_guided(self.guidance) else 1)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        # Guidance 0 was the empty prompt's velocity once; what was drawn so is not taken for the prompt's.
        return asdict(self) | ({"unguided": True} if self.guidance == 0 else {})


@dataclass(frozen=True, eq=False)
class Drawn:
    """N pictures and how long their paths were.

    Attributes:
        latents: [N, C, h, w] fp32, on the CPU.
        length: [N] fp64, mean of (x1 − x0)² over each picture's numbers, from noise x1 to picture x0.
        energy: [N] fp64, ∫ mean of v² dsigma along the path; equals `length` where the path is straight.
    """

    latents: Tensor
    length: Tensor
    energy: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @staticmethod
    def cat(parts: Sequence[Drawn]) -> Drawn:
        """All pictures of all parts."""
        return Drawn(*(torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "length", "energy")))

    def index(self, rows: Sequence[int]) -> Drawn:
        """The pictures at these positions."""
        picked = list(rows)
        return Drawn(self.latents[picked], self.length[picked], self.energy[picked])


def draw(
    velocity_at: StepVelocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    check: Callable[[Tensor], None] = lambda latents: None,
) -> Drawn:
    """Follows a velocity from noise to pictures.

    The straightness of rectified flow, ∫ E‖(x1 − x0) − v‖² dsigma (Liu et al. 2022, arXiv 2209.03003, eq. 5), is
    `energy − length`: Euler's steps add up to x1 − x0 exactly, so the cross term is −2 ‖x1 − x0‖².

    Args:
        velocity_at: as of `sample.denoise`; on packed latents.
        noise: [N, C, h, w].
        sigmas: a ladder from 1 to 0, see `flow.schedule.ladder`.
        on_step: called after each step.
        check: see `sample.denoise`.
    """
    rows, columns = noise.shape[-2:]
    x, energy = pack(noise), torch.zeros(len(noise), dtype=torch.float64)
    for step in denoise(velocity_at, x, sigmas, check=check):
        velocity = unpack(step.velocity, rows, columns)
        energy += (step.sigma - step.sigma_next) * mean_square(velocity)
        x = step.x
        on_step(step)
    latents = unpack(x, rows, columns)
    return Drawn(latents.float().cpu(), mean_square(noise - latents), energy)


def mean_square(x: Tensor) -> Tensor:
    """[N] fp64 on the CPU: mean of x² over each picture's numbers."""
    return x.float().square().flatten(1).mean(dim=1).cpu().double()
