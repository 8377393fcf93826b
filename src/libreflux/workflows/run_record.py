"""What a run keeps beside its checkpoints: sample sheets, held-out measurements, and curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux.data.cache import Cache
from libreflux.data.held_out import HeldOut
from libreflux.data.summary import SourceSummary
from libreflux.model.device import release
from libreflux.model.facts import Facts
from libreflux.model.finite import NotFiniteError
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.probing.held_out import measure_held_out
from libreflux.recipe import Recipe
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.run_state import SHEETS
from libreflux.workflows.tensorboard import Board, require_tensorboard
from libreflux.workflows.train_events import TrainEvents


class RunRecorder(Callbacks):
    """Writes sample sheets, held-out measurements and curves into the run folder. A context: so that its files end.

    Args:
        recipe: the run's.
        events: hears of all that training tells and of what is found; None: nobody does.

    Attributes:
        started_at: finished steps when this process began to train; None: it did not, the run was finished.

    Raises:
        RunError: the recipe asks for TensorBoard, which is not installed.
    """

    def __init__(self, recipe: Recipe, events: TrainEvents | None = None) -> None:
        self.recipe, self.events = recipe, events or TrainEvents()
        self.started_at: int | None = None
        if recipe.tensorboard:
            require_tensorboard()
        self._source: ModelSource | str = recipe.model
        self._facts: Facts | None = None
        self._vae: AutoencoderKL | None = None
        self._board: Board | None = None

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.events.on_end()
        if self._board is not None:
            self._board.close()

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        self.events.on_prepare(done, total, note)

    def on_data(self, found: SourceSummary) -> None:
        self.events.on_data(found)

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        with self.events.stage(doing):
            yield

    def on_notice(self, line: str) -> None:
        self.events.on_notice(line)

    def on_start(self, started: Started) -> None:
        self._source, self.started_at = started.source, started.step
        self._facts = started.sample_facts or started.facts
        checkpoint.rewind(started.run / checkpoint.HELD_OUT, started.step)
        for step, path in checkpoint.numbered(started.run / SHEETS, ".png").items():
            if step > started.step:  # those steps are taken again, after a fork from here otherwise
                path.unlink()
        if self.recipe.tensorboard:
            self._board = Board(started.run, started.step)
        self.events.on_start(started)

    def on_step(self, info: StepInfo) -> None:
        if self._board is not None:
            self._board.add_step(info)
        self.events.on_step(info)

    def on_save(self, step: int, folder: Path) -> None:
        self.events.on_save(step, folder)

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
        recipe, total = self.recipe, len(held_out)
        found = measure_held_out(
            transformer,
            held_out,
            sigmas=recipe.held_out.sigmas,
            batch=recipe.batch,
            guidance=recipe.guidance,
            on_batch=lambda done: self.events.on_measuring(step, done, total),
        )
        checkpoint.record(Path(recipe.out) / checkpoint.HELD_OUT, {"step": step, **found.as_json()})
        self.events.on_measured(step, found)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        if not self.recipe.samples.prompts:
            return
        try:
            picture = self.sample_sheet(transformer)
        except NotFiniteError as error:  # a run is worth more than a sheet, and would meet it again when resumed
            self.events.on_no_sheet(step, error)
            return
        if self._board is not None:
            self._board.add_sheet(step, picture)
        path = Path(self.recipe.out) / SHEETS / f"{checkpoint.step_name(step)}.png"
        save_png(picture, path)
        self.events.on_sheet(step, path)

    def sample_sheet(self, transformer: FluxTransformer2DModel) -> Image.Image:
        """The recipe's sample prompts (rows) at its guidance scales (columns), drawn with a live transformer."""
        if self._vae is None:
            self._vae = open_model(self._source).load_vae(dtype=torch.float32)
        self._vae.to(transformer.device)
        try:
            return self._drawn(transformer, self._vae)
        finally:
            with suppress(RuntimeError):  # a card that failed fails again: the first error is the one to tell
                self._vae.to("cpu")  # until the next sheet: training would pay for 0.3 GiB on the card
                release(transformer.device)

    def _drawn(self, transformer: FluxTransformer2DModel, vae: AutoencoderKL) -> Image.Image:
        wanted, cache = self.recipe.samples, Cache(self.recipe.cache_dir)
        pipe = LibreFluxPipeline(transformer=transformer, vae=vae, facts=self._facts)
        pipe.set_progress_bar_config(disable=True)
        rows: list[list[Any]] = [
            [
                pipe(
                    prompt_conditioning=cache.text([prompt]),
                    negative_conditioning=cache.text([""]),
                    guidance_scale=guidance,
                    height=max(self.recipe.resolution),
                    width=max(self.recipe.resolution),
                    seeds=[wanted.seed],
                ).images[0]
                for guidance in wanted.guidance
            ]
            for prompt in wanted.prompts
        ]
        return sheet(rows, list(wanted.prompts), [f"guidance {guidance:g}" for guidance in wanted.guidance])
