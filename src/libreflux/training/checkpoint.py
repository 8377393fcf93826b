"""Checkpoints of a run: complete or absent, verified, numbered by finished steps, never ordered by name or date.

    RUN/recipe.json                                   what this run was started with, and each later fork
    RUN/metrics.jsonl                                 one line per finished step
    RUN/held_out.jsonl                                one line per measurement of the held-out pictures
    RUN/checkpoints/step-00000500/adapter.safetensors      only what is trained
                                 /optimizer.safetensors
                                 /heads.safetensors        of an adversary, and heads_optimizer.safetensors
                                 /ema.safetensors          its averages, if the recipe asks for some
                                 /state.json
                                 /manifest.json            sizes and hashes, written last
    RUN/averages/step-00000500/ema.safetensors             averages kept for hindsight, never pruned
                              /manifest.json
    RUN/adapter.safetensors                           the result, when the last step is done

A checkpoint is staged beside its final name and appears by one rename, so that a process killed at any moment leaves
either the whole of it or nothing. Deleting one works the other way round: it is renamed away first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux import files, plainjson
from libreflux.errors import RunError
from libreflux.places import placed
from libreflux.printing import get_logger
from libreflux.recipe import Recipe, differences
from libreflux.training import run_recipe

log = get_logger(__name__)

SCHEMA = 1
FOLDER = "checkpoints"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGES = "ema.safetensors"
HEADS, HEADS_OPTIMIZER = "heads.safetensors", "heads_optimizer.safetensors"
STATE = "state.json"
RECIPE, claim = run_recipe.RECIPE, run_recipe.claim
METRICS = "metrics.jsonl"
HELD_OUT = "held_out.jsonl"

WRITTEN = (FOLDER, "averages", "samples")
_NAME = re.compile(r"step-(\d{8,})")

Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder.

    Attributes:
        step: finished optimizer steps.
        path: the folder.
    """

    step: int
    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def optimizer(self) -> Path:
        return self.path / OPTIMIZER

    @property
    def heads(self) -> Path:
        return self.path / HEADS

    @property
    def averages(self) -> Path:
        return self.path / AVERAGES

    def state(self) -> dict[str, Any]:
        """The contents of state.json.

        Raises:
            RunError: it was written by a later schema.
        """
        state: dict[str, Any] = plainjson.parse((self.path / STATE).read_text(encoding="utf-8"))
        if state.get("schema") != SCHEMA:
            raise RunError(
                f"checkpoint schema {state.get('schema')!r} is not {SCHEMA}",
                where=self.path,
                hint="resume with the libreflux version that wrote it",
            )
        return state


def step_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-00000500 for step 500."""
    return run / FOLDER / step_name(step)


def step_name(step: int) -> str:
    """step-00000500 for step 500."""
    return f"step-{step:08d}"


def write(run: Path, step: int, writers: Mapping[str, Writer], state: Mapping[str, Any]) -> Checkpoint:
    """Writes one checkpoint: all of it or, if the process dies, none of it.

    Args:
        run: the run folder.
        step: finished optimizer steps.
        writers: file name -> function that writes that file at the path it is given.
        state: JSON-able facts; `schema` and `step` are added.
    """
    final = step_folder(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    with files.staged_dir(final) as folder:
        for name, writer in writers.items():
            writer(folder / name)
        text = json.dumps({"schema": SCHEMA, "step": step, **state}, indent=1, sort_keys=True)
        (folder / STATE).write_text(text + "\n", encoding="utf-8")
        files.write_manifest(folder)
    return Checkpoint(step, final)


def listed(run: Path) -> list[Checkpoint]:
    """The checkpoint folders of a run by ascending step, not verified."""
    return [Checkpoint(step, path) for step, path in step_folders(run / FOLDER).items()]


def step_folders(folder: Path) -> dict[int, Path]:
    """Step -> its folder of those in `folder` that are named as `step_name` names them, rising."""
    return {step: path for step, path in numbered(folder).items() if path.is_dir()}


def numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> path of what is named as `step_name` names it, with this suffix; rising."""
    if not folder.is_dir():
        return {}
    names = ((path.name.removesuffix(suffix), path) for path in folder.glob(f"*{suffix}"))
    found = sorted((int(match[1]), path) for name, path in names if (match := _NAME.fullmatch(name)))
    return {step: path for step, path in found if path.name == step_name(step) + suffix}


def latest(run: Path) -> Checkpoint | None:
    """The highest step whose files agree with their manifest, or None. Damaged ones above it are named in a warning.

    Without the lock too: what a live run deletes meanwhile is not damaged, and what it has saved instead is found.
    """
    seen: set[int] = set()
    for _ in range(2):  # all that were listed may be gone by the time they are read
        for checkpoint in reversed(listed(run)):
            if checkpoint.step in seen:
                continue
            seen.add(checkpoint.step)
            try:
                files.verify_manifest(checkpoint.path)
            except (RunError, FileNotFoundError) as damage:
                if checkpoint.path.is_dir():
                    log.warning("%s is not used: %s", checkpoint.path.name, damage)
                continue
            return checkpoint
    return None


def recover(run: Path) -> Checkpoint | None:
    """`latest`, after sweeping away what a killed process left: unfinished files, stages and deletions.

    Damaged checkpoints above the latest are renamed `damaged-…`, so that the resumed run can write its own. Call it
    with the run locked.
    """
    for folder in (run, *(run / name for name in WRITTEN)):
        files.sweep(folder)
    newest = latest(run)
    for checkpoint in listed(run):
        if newest is None or checkpoint.step > newest.step:
            aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(checkpoint.path, aside)
    return newest


def doomed(steps: Iterable[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to delete: all but the newest `keep` (≥ 1) and the multiples of `keep_every` (None or 0: no such)."""
    ordered = sorted(steps)
    return [step for step in ordered[: -max(keep, 1)] if not (keep_every and step % keep_every == 0)]


def prune(run: Path, keep: int, keep_every: int | None) -> list[int]:
    """Deletes the checkpoints that `doomed` names and returns their steps."""
    by_step = {checkpoint.step: checkpoint.path for checkpoint in listed(run)}
    steps = doomed(by_step, keep, keep_every)
    for step in steps:
        files.remove_folder(by_step[step])
    return steps


# ---- the recipe of a run ------------------------------------------------------------------------------------------


def changes(run: Path, recipe: Recipe, world: int = 1) -> dict[str, list[Any]]:
    """What differs from the recipe of the run that is there; nothing, if that has saved nothing yet.

    Args:
        run: the run folder, locked.
        recipe: as resolved now; what does not decide the trained numbers (`Recipe.decisive`) may differ.
        world: processes; world × accumulate counts.

    Returns:
        Dotted key -> [value then, value now]; None where it is absent. Paths (see `run_recipe.moved`) are among them if
        something else has changed: another path alone is no change, its contents are compared when they are read.

    Raises:
        RunError: recipe.json is missing or torn.
    """
    if not listed(run) and not (run / ADAPTER).exists():
        return {}
    if not (run / RECIPE).exists():
        hint = "choose another `out`, or put the file back"
        raise RunError(f"there are checkpoints but no {RECIPE}", where=run, hint=hint)
    was, its_world, _ = run_recipe.read(run / RECIPE)
    before, after = was.decisive(its_world), recipe.decisive(world)
    found = {key: [_at(before, key), _at(after, key)] for key in differences(before, after)}
    if recipe.objective == "flow":  # a student's steps depend on its base's schedule too
        found.pop("model", None)  # whose weights have a hash of their own
    for key in ("adapter.init_from", "adapter.lycoris_config"):
        if key in found and run_recipe.same_place(*found[key]):
            del found[key]
    return {**found, **run_recipe.moved(run, recipe)} if found else {}


def check_recipe(
    run: Path, recipe: Recipe, world: int = 1, hint: str = "restore these keys to resume, or choose another `out`"
) -> None:
    """Checks that this recipe continues the run that is there, if one has saved anything yet; see `changes`.

    Raises:
        RunError: a decisive key has changed; the line names it with its old and new value.
    """
    require_same(changes(run, recipe, world), run, hint)


def require_same(changed: Mapping[str, Sequence[Any]], run: Path, hint: str) -> None:
    """Raises RunError, which names each key with its old and new value, if `changes` found some."""
    if changed:
        told = run_recipe.told_changes(changed)
        raise RunError(f"the recipe has changed since this run began: {told}", where=run, hint=hint)


def stored_forks(run: Path) -> list[dict[str, Any]]:
    """The forks that RUN/recipe.json knows of; none without one."""
    return run_recipe.read(run / RECIPE)[2] if (run / RECIPE).exists() else []


def stored_recipe(run: Path) -> Recipe:
    """RUN/recipe.json.

    Raises:
        RunError: it is torn.
    """
    return run_recipe.read(run / RECIPE)[0]


def _at(tree: Any, dotted: str) -> Any:
    """The value under a dotted key; None where there is none."""
    for name in dotted.split("."):
        try:
            tree = tree[int(name)] if isinstance(tree, list | tuple) else tree[name]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return tree


# ---- the result and the metrics -----------------------------------------------------------------------------------


def publish(run: Path, checkpoint: Checkpoint) -> Path:
    """Copies the adapter of the last checkpoint to RUN/adapter.safetensors, atomically."""
    result = run / ADAPTER

    def fill(temporary: Path) -> None:
        shutil.copyfile(checkpoint.adapter, temporary)

    files.replace_whole(result, fill)
    return result


class Metrics:
    """Appends lines to RUN/metrics.jsonl, each written through at once.

    Args:
        run: the run folder.
        step: finished steps; lines after it, and a torn last line, are dropped first: those steps are trained again.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._path = run / METRICS
        rewind(self._path, step)

    def __enter__(self) -> Metrics:
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *error: object) -> None:
        with placed(self._path):
            self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one JSON object; `step` is one of its keys."""
        with placed(self._path):
            self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Lets the lines written so far survive a power cut."""
        with placed(self._path):
            os.fsync(self._file.fileno())


def rewind(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl file after `step` and a torn last line: those steps are trained again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number = plainjson.parse(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if number <= step:
            kept.append(line + "\n")
    files.atomic_write_text(path, "".join(kept))


def record(path: Path, line: Mapping[str, Any]) -> None:
    """Writes a JSON object into a .jsonl file in place of all lines from its `step` on."""
    rewind(path, line["step"] - 1)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
