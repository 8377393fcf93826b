"""What a training run shows of itself: progress and sample pictures. Training knows none of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux.adapter.targets import brief, table
from libreflux.cli.board import Board, require_tensorboard
from libreflux.cli.progress import Report, announced, line_width, progress
from libreflux.data.cache import Cache
from libreflux.data.held_out import HeldOut
from libreflux.data.summary import SourceSummary
from libreflux.model.device import release
from libreflux.model.facts import Facts
from libreflux.model.finite import NotFiniteError
from libreflux.model.source import open_model
from libreflux.printing import counted, readable, say
from libreflux.probing.held_out import measure_held_out
from libreflux.recipe import Recipe
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, Started, StepInfo
from libreflux.training.standing import SHEETS, all_done


def memory_used() -> int:
    """Bytes: the peak of what torch holds on CUDA, once it is used; else what this process holds in memory now."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


class ShowTraining(Callbacks):
    """Progress on stderr; sample sheets, held-out measures and curves in the run folder. A context: so its bar ends.

    Args:
        recipe: the run's.
        layers: whether each adapted layer is listed at the start.

    Attributes:
        started_at: finished steps when this process began to train; None: it did not, the run was finished.

    Raises:
        RunError: the recipe asks for TensorBoard, which is not installed.
    """

    def __init__(self, recipe: Recipe, *, layers: bool = False) -> None:
        self.recipe, self._layers = recipe, layers
        self.started_at: int | None = None
        if recipe.tensorboard:
            require_tensorboard()
        self.losses: list[float] = []
        self.kept: list[float] = []
        self._bars = ExitStack()
        self._report: Report | None = None
        self._doing = ""
        self._facts: Facts | None = None
        self._vae: AutoencoderKL | None = None
        self._board: Board | None = None
        self._held_out: HeldOut | None = None

    def __enter__(self) -> ShowTraining:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.close()
        if self._board is not None:
            self._board.close()

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        self._bar("preparing", "item")(done, total, note)

    def on_data(self, found: SourceSummary) -> None:
        self._bars.close()  # or its live line and these would write over one another
        self._doing = ""
        for line in found.lines(line_width()):
            say(line, err=True)

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        with announced(doing):
            yield

    def on_notice(self, line: str) -> None:
        say(line, err=True)

    def on_start(self, started: Started) -> None:
        self._bars.close()
        self._doing = ""
        self._facts, self._held_out, self.started_at = started.facts, started.held_out, started.step
        checkpoint.rewind(started.run / checkpoint.HELD_OUT, started.step)
        for step, path in checkpoint.numbered(started.run / SHEETS, ".png").items():
            if step > started.step:  # those steps are taken again, after a fork from here otherwise
                path.unlink()
        if self.recipe.tensorboard:
            self._board = Board(started.run, started.step)
        for line in summary(started, self._layers, line_width()):
            say(line, err=True)
        self._bar("training", "step")(started.step, started.steps, begun=True)

    def on_step(self, info: StepInfo) -> None:
        if info.loss is not None:
            self.losses.append(info.loss)
        if info.regularisation_loss is not None:
            self.kept.append(info.regularisation_loss)
        if self._board is not None:
            self._board.add_step(info)
        told = (("loss", self.losses), ("regularisation", self.kept))
        parts = [f"{name} {fmean(losses[-50:]):.4f}" for name, losses in told if losses]
        parts += [f"gradient {info.gradient_norm:.3g}"] if info.gradient_norm is not None else []
        parts += [f"{readable(info.pictures_per_second)} pictures/s", f"{readable(memory_used() / 1e9)} GB"]
        parts += [f"{info.skipped} skipped"] if info.skipped else []
        self._bar("training", "step")(info.step, info.steps, ", ".join(parts))

    def on_measure(self, step: int, transformer: FluxTransformer2DModel) -> None:
        recipe, held_out = self.recipe, self._held_out
        assert held_out is not None

        def told(done: int) -> None:
            if self._doing == "training" and step < recipe.steps:  # a finished bar has nothing more to tell
                note = f"{done} of {counted(len(held_out), 'held-out picture')} measured"
                self._bar("training", "step")(step, recipe.steps, note)

        found = measure_held_out(
            transformer,
            held_out,
            sigmas=recipe.held_out.sigmas,
            batch=recipe.batch,
            guidance=recipe.guidance,
            on_batch=told,
        )
        checkpoint.record(Path(recipe.out) / checkpoint.HELD_OUT, {"step": step, **found.as_json()})
        say(f"step {step}: {found.line()}", err=True)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        wanted = self.recipe.samples
        if not wanted.prompts:
            return
        try:
            picture = self.sample_sheet(transformer)
        except NotFiniteError as error:  # a run is worth more than a sheet, and would meet it again when resumed
            say(f"step {step}: no sample sheet: {error}", err=True)
            return
        if self._board is not None:
            self._board.add_sheet(step, picture)
        save_png(picture, Path(self.recipe.out) / SHEETS / f"{checkpoint.step_name(step)}.png")

    def sample_sheet(self, transformer: FluxTransformer2DModel) -> Image.Image:
        """The recipe's sample prompts (rows) at its guidance scales (columns), drawn with a live transformer."""
        if self._vae is None:
            self._vae = open_model(self.recipe.model).load_vae(dtype=torch.float32)
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

    def _bar(self, what: str, unit: str) -> Report:
        if self._doing != what or self._report is None:
            self._bars.close()
            self._report = self._bars.enter_context(progress(what, unit))
            self._doing = what
        return self._report


def summary(started: Started, layers: bool, width: int) -> list[str]:
    """What is told of a run before its first step, in lines of at most `width` characters.

    Args:
        started: the run.
        layers: whether each adapted layer is listed.
        width: of the terminal.
    """
    if started.step == started.steps:
        lines = [f"{all_done(started.steps)}; what was due after the last one is made now"]
    else:
        begun = f"resumes after step {started.step}" if started.step else "begins"
        apart = f", {counted(len(started.held_out), 'held-out picture')}" if started.held_out is not None else ""
        epoch = f"{counted(started.epoch_steps, 'step')} an epoch"
        count = f"{counted(started.steps, 'step')}, {counted(started.pictures, 'picture')}"
        lines = [f"{begun}: {count}{apart}, {epoch}"]
    lines.append(f"adapter: {brief(started.resolved)}{'' if layers else ' (--layers lists them)'}")
    if started.start_norm is not None:
        lines.append(f"it starts at {started.start_norm:.3g} of the adapted weights' norm")
    lines.append(f"run folder: {started.run}")
    wrapped = [
        part for line in lines for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    ]
    return wrapped + (table(started.resolved, width).split("\n") if layers else [])
