"""Going on under a changed recipe: what may change, and what a run remembers of it.

A fork goes on in its run folder from the last checkpoint. Weights, optimizer state, averages and the step number stay;
from the next step on, order, noise and learning rate are what the new recipe gives for that number. The epoch under way
is then another cut of the pictures: some of them are shown once more or once less in it.

RUN/recipe.json becomes the new recipe, with one entry more under `forks`:
    {"step": 400, "changed": {"batch": [2, 4]}, "data_hash": …}    null for a key that one side does not have
It is written before the fork's first step. A fork that is killed before its first checkpoint goes on without `fork`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libreflux.data.cache import index_folders
from libreflux.data.digests import FileMemory
from libreflux.data.held_out import HeldOut, places
from libreflux.errors import OptionHint, RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, run_recipe

Fork = dict[str, Any]

RESTORE = OptionHint("restore these keys to resume, go on under the new ones with `fork`, or choose another `out`")


def allow(run: Path, recipe: Recipe, world: int, *, fork: bool) -> bool:
    """Whether this recipe differs from that of the run that is there.

    Args:
        run: the run folder, locked.
        recipe: as resolved now.
        world: processes; only world × accumulate counts.
        fork: whether it may differ.

    Raises:
        RunError: it differs and may not, or in what a fork cannot change: the adapter and the kind of optimizer, whose
            tensors are in the checkpoint.
    """
    changed = checkpoint.changes(run, recipe, world)
    settled = [key for key in changed if key.split(".")[0] == "adapter" or key == "optimizer.kind"]
    if settled:
        hint = f"restore {', '.join(settled)}, or choose another `out`; adapter.init_from starts from an adapter file"
        checkpoint.require_same(changed, run, hint)
    before, after = changed.get("held_out.share", (0, 0))
    if (after or 0) > (before or 0):  # the shares are nested: what a smaller one adds to training is new to it, no harm
        hint = "restore held_out.share, or choose another `out`: the pictures it adds have been trained on"
        checkpoint.require_same({"held_out.share": [before, after]}, run, hint)
    if not fork:
        checkpoint.require_same(changed, run, RESTORE)
    return bool(changed)


def refuse_trained(recipe: Recipe, forks: Sequence[Fork], held_out: HeldOut | None) -> None:
    """Refuses pictures of `held_out.path` that this run was trained on before one of its forks.

    Those are the files of a folder that was in `data` then, but for what `held_out.share` kept apart, and their copies:
    the cache remembers what a file was, also of one that has since been moved.

    Args:
        recipe: as resolved now.
        forks: see `history`.
        held_out: what would be measured.

    Raises:
        RunError: names the first.
    """
    folders = _once_trained(recipe, forks)
    if held_out is None or recipe.held_out.path is None or not folders:
        return
    ids = dict(zip(held_out.sample_ids, held_out.paths, strict=True))
    place = dict(zip(ids, places(held_out.sample_ids).tolist(), strict=True))
    memory = FileMemory(recipe.cache_dir, index_folders(recipe.cache_dir))
    for name, file in itertools.chain(ids.items(), memory.paths_of(ids.keys())):
        for step, folder, share in folders:
            if place[name] >= share and Path(os.path.realpath(file)).is_relative_to(folder):
                told = f"was trained on before the fork at step {step}, as {file}"
                raise RunError(told, where=ids[name], hint="hold out other pictures, or choose another `out`")


def _once_trained(recipe: Recipe, forks: Sequence[Fork]) -> list[tuple[int, str, float]]:
    """(step of the fork, folder, held_out.share until then) of all that was trained on before each fork."""
    found, share = [], recipe.held_out.share
    folders: dict[str, str | None] = {str(number): source.path for number, source in enumerate(recipe.data)}
    begun = [0, *(one["step"] for one in forks)]
    for fork, since in reversed(list(zip(forks, begun, strict=False))):
        share = fork["changed"].get("held_out.share", [share])[0] or 0.0
        for key, (before, _) in fork["changed"].items():
            if match := re.fullmatch(r"data\.(\d+)\.path", key):
                folders[match[1]] = before
        if fork["step"] > since:
            real = [os.path.realpath(os.path.expanduser(path)) for path in folders.values() if path is not None]
            found += [(fork["step"], path, share) for path in real]
    return found


def history(
    run: Path, recipe: Recipe, world: int, step: int, state: Mapping[str, Any], data_hash: str, *, fork: bool
) -> list[Fork]:
    """The forks of a run that goes on now, this one included if something has changed.

    Args:
        run: the run folder, locked by the first process.
        recipe: as resolved now.
        world: processes.
        step: of the checkpoint it goes on from.
        state: that checkpoint's state.json.
        data_hash: of the data that is there now.
        fork: whether the data may differ.

    Raises:
        RunError: the data differs and may not.
    """
    # Of a fork whose checkpoints are all gone the steps are trained again, from here.
    known = [{**one, "step": min(one["step"], step)} for one in checkpoint.stored_forks(run)]
    agreed = known[-1]["data_hash"] if known and known[-1]["step"] == step else state["data_hash"]
    moved = run_recipe.moved(run, recipe)
    if agreed != data_hash and not fork:
        ways = "put them back as they were, go on with what is there now with `fork`, or choose another `out`"
        told = "the pictures, captions or encoders have changed since this run began"
        told += f": {run_recipe.told_changes(moved)}" if moved else ""
        raise RunError(told, where=run, hint=OptionHint(ways))
    changed = checkpoint.changes(run, recipe, world)
    if not changed and agreed == data_hash:
        return known
    changed |= moved
    return [*known, {"step": step, "changed": changed, "data_hash": data_hash}]
