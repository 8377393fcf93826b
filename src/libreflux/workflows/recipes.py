"""Recipes as Python callers and commands give them: a file, a recipe, or its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from libreflux.recipe import Recipe, load_recipe, recipe_of

RecipeArgument: TypeAlias = Recipe | Path | str | Mapping[str, Any]
"""A recipe, the path of its YAML file, or a tree of its keys and values."""


def resolve_recipe(recipe: RecipeArgument, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with `key=value` texts laid over it.

    Args:
        recipe: see `RecipeArgument`.
        overrides: see `recipe.load_recipe`.

    Raises:
        RecipeError: no such file, unreadable, an unknown key, or a bad value.
    """
    overrides = [overrides] if isinstance(overrides, str) else list(overrides or ())
    if isinstance(recipe, str | Path):
        return load_recipe(Path(recipe), overrides)
    if isinstance(recipe, Recipe):
        return recipe_of(recipe.resolved(), "recipe", overrides) if overrides else recipe
    return recipe_of(_plain(recipe), "recipe", overrides)


def _plain(value: Any) -> Any:
    """A copy, into which overrides may be written, with paths as a recipe has them."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
