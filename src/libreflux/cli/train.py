"""`libreflux train RECIPE [key=value…]`: trains; the same command resumes."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli.progress import announced, line_width, progress
from libreflux.errors import RecipeError
from libreflux.printing import counted, readable, say, say_table
from libreflux.workflows.train import TrainOptions, train_with
from libreflux.workflows.train_events import TrainEvents

if TYPE_CHECKING:
    from libreflux.data.summary import SourceSummary
    from libreflux.model.finite import NotFiniteError
    from libreflux.probing.held_out import HeldOutTable
    from libreflux.recipe import Recipe
    from libreflux.training.callbacks import Started, StepInfo
    from libreflux.workflows.progress import Report


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print whether it fits, and what memory, disk, steps and time it takes; train nothing."
        ),
    ] = False,
    fork: Annotated[
        bool, typer.Option("--fork", help="Go on from the last checkpoint though the recipe or the data have changed.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List every adapted layer.")] = False,
    whole: Annotated[
        bool, typer.Option("--all", help="With --dry-run: also the adapted layers and the resolved recipe.")
    ] = False,
) -> None:
    """Train an adapter. Stop it at any time: the same command goes on from the last checkpoint."""
    from libreflux.recipe import load_recipe

    if whole and not dry_run:
        raise RecipeError("has no effect without --dry-run", where="--all", hint="use --layers, or add --dry-run")
    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        _dry_run(resolved, layers=layers, whole=whole)
        return
    result = train_with(TrainOptions(resolved, fork=fork, events=TrainingDisplay(layers=layers)))
    code = result.stopped.exit_code if result.stopped else 0
    if result.rank != 0:  # of several processes the first one speaks
        sys.exit(code)
    from libreflux.workflows.next_steps import commands, finished

    say(result.stopped or finished(resolved, result.started_at), err=True)
    if result.adapter is not None:
        say(f"adapter: {result.adapter}")
        say("what can be done with it:", err=True)
        for command in commands(resolved):
            say(f"  {command}", err=True)
    sys.exit(code)


def _dry_run(recipe: Recipe, *, layers: bool, whole: bool) -> None:
    from libreflux.cli.terminal import text_width

    with announced("estimating the run", after=3.0):
        from libreflux.workflows.dry_run import DryRunOptions, dry_run_with

        found = dry_run_with(DryRunOptions(recipe))
    say_table(found.text(text_width(), layers=layers, whole=whole))
    if found.fault is not None:
        raise found.fault


class TrainingDisplay(TrainEvents):
    """Bars and lines on stderr.

    Args:
        layers: whether each adapted layer is listed at the start.
    """

    def __init__(self, *, layers: bool = False) -> None:
        self._layers = layers
        self._losses: dict[str, list[float]] = {}
        self._bars = ExitStack()
        self._report: Report | None = None
        self._doing = ""
        self._steps = 0

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        self._bar("preparing", "item")(done, total, note)

    def on_data(self, found: SourceSummary) -> None:
        self.on_end()  # or its live line and these would write over one another
        say(*found.lines(line_width()), err=True)

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        with announced(doing):
            yield

    def on_notice(self, line: str) -> None:
        say(line, err=True)

    def on_start(self, started: Started) -> None:
        self.on_end()
        self._steps = started.steps
        say(*summary(started, self._layers, line_width()), err=True)
        self._bar("training", "step")(started.step, started.steps, begun=True)

    def on_step(self, info: StepInfo) -> None:
        parts = []
        for name, loss in _told_losses(info).items():
            losses = self._losses.setdefault(name, [])
            losses += [] if loss is None else [loss]
            parts += [f"{name} {fmean(losses[-50:]):.4f}"] if losses else []
        parts += [f"gradient {info.gradient_norm:.3g}"] if info.gradient_norm is not None else []
        parts += [f"{readable(info.pictures_per_second)} pictures/s", f"{readable(_memory_used() / 1e9)} GB"]
        parts += [f"{info.skipped} skipped"] if info.skipped else []
        self._bar("training", "step")(info.step, info.steps, ", ".join(parts))

    def on_measuring(self, step: int, done: int, total: int) -> None:
        if self._doing == "training" and step < self._steps:  # a finished bar has nothing more to tell
            note = f"{done} of {counted(total, 'held-out picture')} measured"
            self._bar("training", "step")(step, self._steps, note)

    def on_measured(self, step: int, found: HeldOutTable) -> None:
        say(f"step {step}: {found.line()}", err=True)

    def on_no_sheet(self, step: int, error: NotFiniteError) -> None:
        say(f"step {step}: no sample sheet: {error}", err=True)

    def _bar(self, what: str, unit: str) -> Report:
        if self._doing != what or self._report is None:
            self._bars.close()
            self._report = self._bars.enter_context(progress(what, unit))
            self._doing = what
        return self._report

    def on_end(self) -> None:
        self._bars.close()
        self._doing = ""


def _told_losses(info: StepInfo) -> dict[str, float | None]:
    """What the bar shows of a step's losses."""
    adversary, parts = info.adversary or {}, info.parts or {}
    return {
        "loss": info.loss,
        "regularisation": info.regularisation_loss,
        "discriminator": adversary.get("discriminator_loss"),
        "plain": parts.get("plain_loss"),
        "guided": parts.get("guided_loss"),
        "held": parts.get("hold_base_loss"),
    }


def _memory_used() -> int:
    """Bytes: the peak of what torch holds on CUDA, once it is used; else what this process holds in memory now."""
    import psutil
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def summary(started: Started, layers: bool, width: int) -> list[str]:
    """What is told of a run before its first step, in lines of at most `width` characters; with each layer or not."""
    from libreflux.adapter.targets import brief, table
    from libreflux.training.run_state import all_done

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
