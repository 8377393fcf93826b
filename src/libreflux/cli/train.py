"""`libreflux train RECIPE [key=value…]`: trains; the same command resumes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import LibrefluxError, RecipeError, RunError
from libreflux.printing import say, say_table


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
        from libreflux.cli.dry_run import report
        from libreflux.cli.progress import announced
        from libreflux.cli.terminal import text_width

        with announced("estimating the run", after=3.0):
            text, fault = report(resolved, text_width(), layers=layers, whole=whole)
        say_table(text)
        if fault is not None:
            raise fault
        return

    _refuse_second_trainer(Path(resolved.out))
    from libreflux.cli.next_steps import commands, finished
    from libreflux.cli.training import ShowTraining
    from libreflux.training.interrupt import Interrupted
    from libreflux.training.loop import fit

    with _no_empty_run(Path(resolved.out)), ShowTraining(resolved, layers=layers) as shown:
        try:
            adapter = fit(resolved, shown, fork=fork)
        except Interrupted as stopped:
            adapter, code, told = None, stopped.exit_code, str(stopped)
        else:
            code, told = 0, finished(resolved, shown.started_at)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        sys.exit(code)
    say(told, err=True)
    if adapter is not None:
        say(f"adapter: {adapter}")
        say("what can be done with it:", err=True)
        for command in commands(resolved):
            say(f"  {command}", err=True)
    sys.exit(code)


def _refuse_second_trainer(run: Path) -> None:
    """At once: what is imported next takes seconds. Of several processes the first one holds the lock for all."""
    from libreflux import files

    if run.is_dir() and os.environ.get("RANK", "0") == "0":
        with files.lock(run):
            pass


@contextmanager
def _no_empty_run(run: Path) -> Iterator[None]:
    """A run that is refused before its first result leaves no folder behind, if there was none before."""
    existed = run.exists() or os.environ.get("RANK", "0") != "0"  # of several processes the first one tidies up
    try:
        yield
    except LibrefluxError:
        from libreflux import files
        from libreflux.training.checkpoint import RECIPE

        if not existed and run.is_dir():
            with suppress(RunError, OSError), files.lock(run):  # what hinders the tidying must not hide the refusal
                if {path.name for path in run.iterdir()} <= {files.LOCK, RECIPE}:
                    shutil.rmtree(run)
        raise
