"""Training a recipe under callbacks that keep what they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel

from libreflux.data.held_out import HeldOut
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.loop import fit

Tree = Callable[..., dict[str, Any]]


class Recorder(Callbacks):
    """Keeps everything it is told, in order; `at` maps an event, e.g. ("save", 2), to something to do in it."""

    def __init__(self, at: dict[tuple[str, int], Callable[[], object]] | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.steps: list[StepInfo] = []
        self.started: Started | None = None
        self.at = at or {}

    def tell(self, event: str, step: int) -> None:
        self.events.append((event, step))
        self.at.get((event, step), lambda: None)()

    def on_start(self, started: Started) -> None:
        self.started = started
        self.tell("start", started.step)

    def on_step(self, info: StepInfo) -> None:
        self.steps.append(info)
        self.tell("step", info.step)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        self.tell("sample", step)

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
        self.tell("measure", step)

    def on_save(self, step: int, folder: Path) -> None:
        self.tell("save", step)


def recorded_fit(tree: dict[str, Any], **at: Any) -> tuple[Recorder, Path]:
    recorder = Recorder(**at)
    return recorder, fit(Recipe.model_validate(tree), recorder)
