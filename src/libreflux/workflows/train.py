"""Trains what a recipe says: sample sheets, held-out measurements and curves in the run folder included. Light."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux import files
from libreflux.errors import LibrefluxError, RunError
from libreflux.processes import own_rank
from libreflux.recipe import Recipe
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.recipes import RecipeArgument, resolve_recipe
from libreflux.workflows.train_events import TrainEvents

if TYPE_CHECKING:
    from libreflux.training.interrupt import Interrupted

OPEN_FILES_STAY = sys.platform == "win32"
"""Whether a file, such as that of a lock, cannot be removed while it is open."""


@dataclass(frozen=True)
class TrainOptions:
    """What to train, and who listens.

    Attributes:
        recipe: a recipe, the path of its YAML file, or a tree of its keys and values.
        overrides: `key=value` texts over it, values in YAML, e.g. "optimizer.learning_rate=1e-4".
        fork: go on from the last checkpoint though the recipe or the data have changed.
        events: hears of the run's progress; None: nobody does.
    """

    recipe: RecipeArgument
    _: KW_ONLY
    overrides: Sequence[str] = ()
    fork: bool = False
    events: TrainEvents | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What became of a run.

    Attributes:
        adapter: RUN/adapter.safetensors; None where the run was stopped before its end.
        run: the run folder.
        started_at: finished steps when this process began to train; None: it had nothing to do, the run was finished.
        recipe: as resolved.
        stopped: the signal that stopped it and the step that it had saved; None for a run that is finished. The same
            call goes on from there. `raise result.stopped` ends a script that must not go on to its next run.
        rank: the number of this process of several that train together; 0 is the first one, or the only one.
    """

    adapter: Path | None
    run: Path
    started_at: int | None
    recipe: Recipe
    stopped: Interrupted | None = None
    rank: int = 0


def train_with(options: TrainOptions) -> TrainResult:
    """Train an adapter, or go on with its training from where its run folder stands.

    A first SIGINT (Ctrl-C), SIGTERM or SIGHUP while steps are taken lets the step finish and saves it; the result then
    says what `stopped` the run. A second one, or one before the first step, does what it does in any Python program.

    Raises:
        RecipeError: the recipe; see `recipe.load_recipe`.
        RunError: another process trains in this run folder; or see `training.loop.fit`.
        LibrefluxError: a fault of the model, the data or the targets. A folder that did not exist before, and holds no
            result yet, is removed.

    Example::

        import libreflux

        libreflux.demo_data("pictures", count=8)
        recipe = {"model": "emoji-base", "data": [{"path": "pictures"}], "resolution": 64, "batch": 2, "steps": 2}
        recipe |= {"adapter": {"targets": [{"layers": "transformer_blocks.0.attn.**", "factor": 4}]}, "out": "run"}
        print(libreflux.train(recipe, overrides=["samples.every=0"]).adapter)  # run/adapter.safetensors
    """
    recipe = resolve_recipe(options.recipe, options.overrides)
    run, (rank, _) = Path(recipe.out), own_rank()
    _refuse_second_trainer(run, rank)

    from libreflux.training.interrupt import Interrupted
    from libreflux.training.loop import fit
    from libreflux.workflows.run_record import RunRecorder

    with no_empty_run(run), RunRecorder(recipe, options.events) as recorder:
        adapter, stopped = None, None
        try:
            adapter = fit(recipe, recorder, fork=options.fork)
        except Interrupted as error:
            stopped = error
        return TrainResult(
            adapter=adapter, run=run, started_at=recorder.started_at, recipe=recipe, stopped=stopped, rank=rank
        )


def _refuse_second_trainer(run: Path, rank: int) -> None:
    """At once: what is imported next takes seconds. Of several processes the first one holds the lock for all."""
    if run.is_dir() and rank == 0:
        with files.lock(run):
            pass


@contextmanager
def no_empty_run(run: Path) -> Iterator[None]:
    """A run that is refused before its first result leaves no folder behind, if there was none before."""
    existed = run.exists() or own_rank()[0] != 0  # of several processes the first one tidies up
    try:
        yield
    except LibrefluxError:
        if not existed and run.is_dir():
            with suppress(RunError, OSError):  # what hinders the tidying must not hide the refusal
                _remove_empty_run(run)
        raise


def _remove_empty_run(run: Path) -> None:
    """Removes a run folder without a result, unless another process holds it."""
    from libreflux.training.checkpoint import RECIPE

    with files.lock(run):
        empty = {path.name for path in run.iterdir()} <= {files.LOCK, RECIPE}
        if empty and not OPEN_FILES_STAY:
            shutil.rmtree(run)
    if empty and OPEN_FILES_STAY:
        (run / files.LOCK).unlink()  # first: it fails where another process has taken the lock since
        shutil.rmtree(run)


train = by_keywords(TrainOptions, train_with)
