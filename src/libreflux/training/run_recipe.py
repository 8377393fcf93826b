"""The recipe that a run folder was begun with, and what of it may differ without deciding a trained number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from libreflux import files, plainjson
from libreflux.errors import RunError
from libreflux.recipe import Recipe, faults

RECIPE = "recipe.json"
_BESIDE = ("world", "forks", "decided")  # what the file holds besides the recipe; the last in older files alone


def claim(run: Path, recipe: Recipe, world: int = 1, forks: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes RUN/recipe.json, once the recipe may go on here and everything it names was found.

    Args:
        run: the run folder, locked.
        recipe: as resolved now.
        world: processes.
        forks: earlier changes of the recipe, see `training.forks`.
    """
    files.atomic_write_json(run / RECIPE, recipe.resolved() | {"world": world, "forks": list(forks)})


def read(path: Path) -> tuple[Recipe, int, list[dict[str, Any]]]:
    """The recipe, the number of processes it ran on, and its forks."""
    try:
        tree = plainjson.parse(path.read_text(encoding="utf-8"))
        world, forks = int(tree["world"]), list(tree.get("forks", []))
        tree = {name: value for name, value in tree.items() if name not in _BESIDE}
        return Recipe.model_validate(tree), world, forks
    except ValidationError as error:
        refused = faults.explain(error, str(path), Recipe)
        hint = "correct that key in this file (one that does nothing can be removed), or choose another `out`"
        raise RunError(f"written under other rules: {refused.what}", where=refused.where, hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        hint = "restore the file, or choose another `out`"
        raise RunError(f"cannot be read as a recipe ({lines[0]})", where=path, hint=hint) from None


def moved(run: Path, recipe: Recipe) -> dict[str, list[str | None]]:
    """Dotted key -> [path then, path now] of what training reads from another place than the run that is there.

    Raises:
        RunError: recipe.json is torn.
    """
    if not (run / RECIPE).exists():
        return {}
    before, after = read(run / RECIPE)[0].places(), recipe.places()
    pairs = {key: [before.get(key), after.get(key)] for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if not same_place(*pair)}


def last_bits_changed(run: Path, recipe: Recipe) -> dict[str, list[Any]]:
    """Key -> [value then, value now] of what changes the last bits of a result at most.

    Raises:
        RunError: recipe.json is torn.
    """
    if not (run / RECIPE).exists():
        return {}
    before, after = read(run / RECIPE)[0].last_bits(), recipe.last_bits()
    return {key: [before[key], value] for key, value in after.items() if before[key] != value}


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two paths lead to one file or folder, seen from here; None is like None alone."""
    if one is None or other is None:
        return one is other
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def told_changes(changed: Mapping[str, Sequence[Any]]) -> str:
    """Each key with its old and new value, in a line."""
    return ", ".join(f"{key} ({_told(then)} -> {_told(now)})" for key, (then, now) in changed.items())


def _told(value: Any) -> str:
    return "none" if value is None else repr(value)
