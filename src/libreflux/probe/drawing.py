"""Pictures drawn for measuring: batches along an Euler ladder, every picture a function of its prompt and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from libreflux import keyed
from libreflux.flow.guidance import cfg
from libreflux.flow.solve import euler
from libreflux.probe.measures import Velocity

FORMULA = 1
"""Raised when the same model and `Wanted` come to give other pictures, not only other last bits."""


@dataclass(frozen=True)
class Wanted:
    """N pictures to draw.

    Attributes:
        prompts, seeds: of each picture.
        guidance: classifier-free guidance scale; 1 is none.
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
        return len(self) * self.steps * (1 if self.guidance == 1 else 2)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


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


def draw(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: Callable[[], None] = lambda: None) -> Drawn:
    """Follows a velocity from noise to pictures.

    The straightness of rectified flow, ∫ E‖(x1 − x0) − v‖² dsigma (Liu et al. 2022, arXiv 2209.03003, eq. 5), is
    `energy − length`: Euler's steps add up to x1 − x0 exactly, so the cross term is −2 ‖x1 − x0‖².

    Args:
        velocity: as of `measures.Velocity`.
        x: noise [N, C, h, w].
        sigmas: a ladder from 1 to 0, see `flow.schedule.ladder`.
        on_step: called after each step.
    """
    start, energy = x, torch.zeros(len(x), dtype=torch.float64)

    def field(state: Tensor, sigma: float) -> Tensor:
        return velocity(state, torch.full((len(state),), sigma, device=state.device))

    for step in euler(field, x, sigmas):
        energy += (step.sigma - step.sigma_next) * mean_square(step.velocity)
        x = step.x
        on_step()
    return Drawn(x.float().cpu(), mean_square(start - x), energy)


def guided(conditional: Velocity, null: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance as a velocity; at scale 1 `null` is not called."""
    if scale == 1:
        return conditional
    return lambda x, sigma: cfg(conditional(x, sigma), null(x, sigma), scale)


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """[N, *shape] fp32 on the CPU, each a function of its seed: what `libreflux generate` starts from at that seed."""
    return torch.stack([torch.randn(tuple(shape), generator=keyed.generator(seed, "noise")) for seed in seeds])


def mean_square(x: Tensor) -> Tensor:
    """[N] fp64 on the CPU: mean of x² over each picture's numbers."""
    return x.float().square().flatten(1).mean(dim=1).cpu().double()
