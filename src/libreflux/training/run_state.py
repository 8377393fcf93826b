"""Where a run folder stands, and what is refused before anything of it could be written over."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import safetensors

from libreflux import plainjson
from libreflux.data.unchanged import data_hash_now
from libreflux.errors import DataError, OptionHint, RunError
from libreflux.printing import get_logger
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, ema, forks
from libreflux.training.checkpoint import Checkpoint

log = get_logger(__name__)

SHEETS = "samples"


@dataclass(frozen=True)
class RunState:
    """Where a run goes on.

    Attributes:
        newest: the checkpoint to go on from; None at the start.
        published: whether the run's result is that checkpoint's adapter, which it becomes last of all: after the sample
            sheet and the measurement of the same step.
    """

    newest: Checkpoint | None
    published: bool

    def left(self, recipe: Recipe) -> bool:
        """Whether there is a step to take, or something of the last step to draw or measure."""
        if self.newest is None or self.newest.step < recipe.steps:
            return True
        return not self.published and (sample_due(recipe, recipe.steps) or measure_due(recipe, recipe.steps))


def sample_due(recipe: Recipe, step: int) -> bool:
    """Whether sample pictures are drawn after `step` steps."""
    if step == 0:
        return recipe.samples.at_start
    return recipe.samples.every > 0 and step % recipe.samples.every == 0


def measure_due(recipe: Recipe, step: int) -> bool:
    """Whether the held-out pictures are measured after `step` steps."""
    return recipe.held_out.due(step, recipe.steps)


def read_state(run: Path) -> RunState:
    """Where a run folder stands, for processes that another one has looked through it for, by `settle`."""
    newest = checkpoint.latest(run)
    return RunState(newest, newest is not None and _is_published(run, newest))


def settle(recipe: Recipe, run: Path, world: int, *, fork: bool) -> RunState:
    """Finds where a run folder stands and removes what killed processes left there.

    Args:
        recipe: as resolved now.
        run: the run folder, locked.
        world: processes.
        fork: whether the recipe and the data may have changed.

    Raises:
        RunError: the recipe has changed and may not; a finished run's data have; steps go back; or something is there
            that training would write over: a result without checkpoints, or one of another run.
    """
    if not checkpoint.listed(run):
        _refuse_lost(run, recipe)
    changed = forks.allow(run, recipe, world, fork=fork)
    newest = checkpoint.recover(run)
    if newest is None:
        _refuse_lost(run, recipe)
        return RunState(None, published=False)
    if newest.step == recipe.steps and changed:
        raise _nothing_to_fork(run, newest.step)
    if newest.step > recipe.steps:
        hint = f"set steps to at least {newest.step}, or choose another `out`"
        raise RunError(f"step {newest.step} is done already, beyond steps: {recipe.steps}", where=run, hint=hint)
    _refuse_foreign(run, newest)
    state = RunState(newest, _is_published(run, newest))
    if not state.left(recipe):
        _check_data(recipe, run, newest, fork=fork)
    return state


def _nothing_to_fork(run: Path, step: int) -> RunError:
    told = f"step {step}, the last, is done already: nothing is left to fork"
    return RunError(told, where=run, hint="raise steps, or choose another `out`")


def _refuse_lost(run: Path, recipe: Recipe) -> None:
    """Refuses to begin again where more than a first stretch was trained, though no checkpoint of it can be read."""
    lost = f"{checkpoint.FOLDER}/ was removed, or no checkpoint in it can be read"
    if (run / checkpoint.ADAPTER).exists():
        hint = f"put {checkpoint.FOLDER}/ back, choose another `out`, or move {checkpoint.ADAPTER} away to begin again"
        raise RunError(f"there is a result, which step 0 would begin to replace: {lost}", where=run, hint=hint)
    steps, told_by = _trained(run)
    every = recipe.save.every
    if (run / checkpoint.RECIPE).exists():
        every = checkpoint.stored_recipe(run).save.every
    if steps > every:  # the first checkpoint comes after so many: a kill before it costs no more
        hint = f"put {checkpoint.FOLDER}/ back, choose another `out`, or move {told_by} away to begin again"
        told = f"{told_by} knows step {steps}, and training would begin again at step 0: {lost}"
        raise RunError(told, where=run, hint=hint)


def _trained(run: Path) -> tuple[int, str]:
    """The highest step that anything but a checkpoint tells of, and what does."""
    told = [(_last_step(run / name), name) for name in (checkpoint.METRICS, checkpoint.HELD_OUT)]
    told.append((max(checkpoint.step_folders(run / ema.FOLDER), default=0), f"{ema.FOLDER}/"))
    told.append((max(checkpoint.numbered(run / SHEETS, ".png"), default=0), f"{SHEETS}/"))
    return max(told, key=lambda one: one[0])


def all_done(steps: int) -> str:
    """Of a run: "all 4 steps are done", "its one step is done"."""
    return "its one step is done" if steps == 1 else f"all {steps:,} steps are done"


def _last_step(path: Path) -> int:
    """The last step in a .jsonl file; 0 without one. A line that a kill cut short has none."""
    steps = [0]
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                steps.append(int(plainjson.parse(line)["step"]))
    return max(steps)


# ---- the result ---------------------------------------------------------------------------------------------------

_Header = tuple[dict[str, str], dict[str, tuple[int, ...]]]


def _header(path: Path) -> _Header | None:
    """Metadata, and the shape of each tensor; None for what cannot be read as safetensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), shapes
    except (safetensors.SafetensorError, OSError):
        return None


def _is_published(run: Path, newest: Checkpoint) -> bool:
    """Whether RUN/adapter.safetensors is the checkpoint's adapter; what is damaged in it is another matter."""
    result = run / checkpoint.ADAPTER
    return result.is_file() and (told := _header(result)) is not None and told == _header(newest.adapter)


def _refuse_foreign(run: Path, newest: Checkpoint) -> None:
    """Refuses to replace a result that another run has made; a damaged copy of this run's is not such."""
    result = run / checkpoint.ADAPTER
    if not result.exists():
        return
    told, own = _header(result), _header(newest.adapter)
    if told is None or own is None:
        log.warning("%s cannot be read: it is written again at the end", result)
        return
    step = int(told[0]["step"]) if told[0].get("step", "").isdigit() else None
    saved = {one.step: one.adapter for one in checkpoint.listed(run)}
    same = told[0].get("model_hash") == own[0].get("model_hash") and told[1] == own[1]
    if step is None or not same or (step in saved and told != _header(saved[step])):
        hint = "move it away: this run would replace it; or choose another `out`"
        raise RunError("this run has not made this file", where=result, hint=hint)
    if step > newest.step:
        line = "%s is of step %d and stays until that is trained again: the newest checkpoint that can be read is of %d"
        log.warning(line, result, step, newest.step)


def _check_data(recipe: Recipe, run: Path, last: Checkpoint, *, fork: bool) -> None:
    """Says whether the data of a finished run are what it was trained on; nothing is encoded for that.

    Raises:
        RunError: they have changed, so that a user may wait for a training that does not come.
    """
    try:
        now = data_hash_now(recipe)
    except DataError as error:
        log.warning("this run is finished, and its data cannot be looked at: %s", error)
        return
    known = checkpoint.stored_forks(run)
    agreed = known[-1]["data_hash"] if known and known[-1]["step"] == last.step else last.state()["data_hash"]
    if now is None or now == agreed:
        return
    if fork:
        raise _nothing_to_fork(run, last.step)
    told = f"{all_done(last.step)}, and its pictures, captions or encoders have changed since"
    hint = OptionHint("raise steps and go on with `fork`, put them back as they were, or choose another `out`")
    raise RunError(told, where=run, hint=hint)
