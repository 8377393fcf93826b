"""What a probe measures and how finely: everything that decides its numbers besides the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from libreflux.flow.schedule import ladder
from libreflux.model.facts import Facts

SIGMAS = (0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 0.98)
QUICK_SIGMAS = (0.25, 0.5, 0.7, 0.9)
FEW_STEPS = 8
"""A model of so many steps or fewer is a few-step student: it has been trained on its ladder's sigmas alone."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the numbers.

    Attributes:
        seed: of noise, pictures drawn and resampling.
        sigmas: noise levels at held-out pictures.
        pictures: held-out pictures.
        prompts: drawn prompts.
        guidance: scales to draw at, with `draw_steps` steps.
        draw_steps: steps wherever steps are not the question.
        steps: numbers of steps to compare, the first against the others, at `own_guidance`.
        own_guidance: the model's default scale of classifier-free guidance.
        diversity_prompts, diversity_seeds: prompts drawn from so many seeds each.
        diversity_guidance: scales that they are drawn at.
        negative_prompts, negative_guidance: prompts drawn with and without a negative prompt, and their scale.
        padding_pictures, padding_sigmas, padding_tokens: where text paddings are compared, and prompts' lengths.
        shown: prompts whose pictures are kept for each purpose.
        resolution: side of the pictures in pixels.
        rungs: sigmas that are on a few-step student's own ladder; () for other models.
        batch: samples per forward pass, which decides the last bits.
        dtype: of the weights; "stored" is the file's.
        data: name and digest of pictures and prompts.
        judge: SHA-256 of the judge's file, None without.
        reader: what reads the text in drawn pictures, None where nothing does.
        seen: subjects that the model was trained on, None where nobody knows.
        measures: name, digest and meaning of each of the user's own, see `own.OwnMeasure`.
    """

    seed: int = 0
    sigmas: tuple[float, ...] = SIGMAS
    pictures: int = 192
    prompts: int = 50
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    draw_steps: int = 28
    steps: tuple[int, ...] = (4, 28, 50)
    own_guidance: float = 1.0
    diversity_prompts: int = 10
    diversity_seeds: int = 5
    diversity_guidance: tuple[float, ...] = (1.0,)
    negative_prompts: int = 16
    negative_guidance: float = 3.0
    padding_pictures: int = 8
    padding_sigmas: tuple[float, ...] = (0.5, 0.9)
    padding_tokens: tuple[int, ...] = (20, 256, 500)
    shown: int = 3
    resolution: int = 128
    rungs: tuple[float, ...] = ()
    batch: int = 32
    dtype: str = "stored"
    data: tuple[str, str] = ("", "")
    judge: str | None = None
    reader: str | None = None
    seen: tuple[str, ...] | None = None
    measures: tuple[tuple[str, str, str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values; `reader` and `measures` only where there are any, as in results of before they came."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        if self.reader is None:
            del found["reader"]
        if not self.measures:
            del found["measures"]
        return found


class Changes(TypedDict, total=False):
    """Some of the `Settings`, by their names."""

    seed: int
    sigmas: tuple[float, ...]
    pictures: int
    prompts: int
    guidance: tuple[float, ...]
    draw_steps: int
    steps: tuple[int, ...]
    own_guidance: float
    diversity_prompts: int
    diversity_seeds: int
    diversity_guidance: tuple[float, ...]
    negative_prompts: int
    padding_pictures: int
    padding_sigmas: tuple[float, ...]
    padding_tokens: tuple[int, ...]
    resolution: int
    batch: int
    dtype: str


QUICK: Changes = {
    "sigmas": QUICK_SIGMAS,
    "pictures": 64,
    "prompts": 16,
    "guidance": (1.0, 3.0, 6.0),
    "steps": (4, 28),
    "diversity_prompts": 4,
    "diversity_seeds": 3,
    "negative_prompts": 4,
    "padding_pictures": 4,
    "padding_sigmas": (0.7,),
    "padding_tokens": (20, 256),
}
"""What `--quick` changes."""
LARGE: Changes = {
    "pictures": 64,
    "prompts": 16,
    "diversity_prompts": 4,
    "diversity_seeds": 4,
    "negative_prompts": 4,
    "padding_pictures": 4,
    "padding_sigmas": (0.7,),
    "batch": 1,
}
"""What changes for a model of billions of parameters."""
LARGE_QUICK: Changes = {"pictures": 16, "prompts": 4, "diversity_prompts": 2, "diversity_seeds": 3}


def own_guidance(facts: Facts) -> float:
    """The model's default scale of classifier-free guidance: 1 for one whose guidance is embedded."""
    return float(facts.cfg_scale)


def rungs(facts: Facts, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Those of these sigmas that a few-step student's ladder visits."""
    if facts.steps > FEW_STEPS:
        return ()
    visited = ladder(facts.steps, facts.shift or 1.0).tolist()
    return tuple(sigma for sigma in sigmas if any(abs(sigma - rung) < 1e-4 for rung in visited))
