"""What a training run shows of itself: progress and sample pictures. Training knows none of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil
import torch
import typer
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from libreflux.adapter.targets import table
from libreflux.cli.board import FOLDER, Board, require_tensorboard
from libreflux.cli.progress import Report, announced, progress
from libreflux.data.cache import Cache
from libreflux.data.held_out import HeldOut
from libreflux.model.facts import Facts
from libreflux.model.family import open_model
from libreflux.model.finite import NotFiniteError
from libreflux.probe.held_out import measure_held_out
from libreflux.recipe import Recipe
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import save_png
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.train import checkpoint
from libreflux.train.callbacks import Callbacks, Started, StepInfo


def memory_used() -> int:
    """Bytes: the peak of what torch holds on CUDA, once it is used; else what this process holds in memory now."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


class ShowTraining(Callbacks):
    """Progress on stderr; sample sheets, held-out measures and curves in the run folder. A context: so its bar ends.

    Args:
        recipe: the run's.

    Raises:
        RunError: the recipe asks for TensorBoard, which is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
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
        self._on_board: int | None = None
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

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        with announced(doing):
            yield

    def on_notice(self, line: str) -> None:
        typer.echo(line, err=True)

    def on_start(self, started: Started) -> None:
        self._bars.close()
        self._doing = ""
        self._facts, self._held_out = started.facts, started.held_out
        checkpoint.rewind(started.run / checkpoint.HELD_OUT, started.step)
        if self.recipe.tensorboard:
            resumes = started.step > 0 and (started.run / FOLDER).is_dir()
            self._on_board = started.step if resumes else None
            self._board = Board(started.run, started.step)
        typer.echo(table(started.resolved), err=True)
        begun = f"resumes after step {started.step}" if started.step else "begins"
        line = f"{begun}: {started.steps} steps, {started.pictures} pictures, {started.epoch_steps} steps an epoch"
        if started.held_out is not None:
            line += f", {len(started.held_out)} held-out pictures"
        line += f", {started.padding_share:.1%} of the text is padding, run folder {started.run}"
        typer.echo(line, err=True)
        if started.start_norm is not None:
            typer.echo(f"the adapter starts at {started.start_norm:.3g} of the adapted weights' norm", err=True)
        if started.step:
            self._bar("training", "step")(started.step, started.steps)

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
        parts += [f"{info.pictures_per_second:.3g} pictures/s", f"{memory_used() / 1e9:.3g} GB"]
        parts += [f"{info.skipped} skipped"] if info.skipped else []
        self._bar("training", "step")(info.step, info.steps, ", ".join(parts))

    def on_measure(self, step: int, transformer: FluxTransformer2DModel) -> None:
        recipe, held_out = self.recipe, self._held_out
        assert held_out is not None

        def told(done: int) -> None:
            if self._doing == "training" and step < recipe.steps:  # a finished bar has nothing more to tell
                note = f"{done} of {len(held_out)} held-out pictures measured"
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
        typer.echo(f"step {step}: {found.line()}", err=True)

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        wanted = self.recipe.samples
        if not wanted.prompts:
            return
        try:
            picture = self.sample_sheet(transformer)
        except NotFiniteError as error:  # a run is worth more than a sheet, and would meet it again when resumed
            typer.echo(f"step {step}: no sample sheet: {error}", err=True)
            return
        path = Path(self.recipe.out) / "samples" / f"step-{step:08d}.png"
        if self._board is not None and not (step == self._on_board and path.exists()):
            self._board.add_sheet(step, picture)
            self._board.flush()  # before the file: that tells a resumed run that the board has this sheet
        save_png(picture, path)

    def on_save(self, step: int, folder: Path) -> None:
        if self._board is not None:
            self._board.flush()  # what a kill costs from here on is trained, and written, again

    def sample_sheet(self, transformer: FluxTransformer2DModel) -> Image.Image:
        """The recipe's sample prompts (rows) at its guidance scales (columns), drawn with a live transformer."""
        wanted, cache = self.recipe.samples, Cache(self.recipe.cache_dir)
        if self._vae is None:
            opened = open_model(self.recipe.model, parts=("vae",), dtype=torch.float32, device=transformer.device)
            self._vae = opened.vae
        assert self._vae is not None
        pipe = LibreFluxPipeline(transformer=transformer, vae=self._vae, facts=self._facts)
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
