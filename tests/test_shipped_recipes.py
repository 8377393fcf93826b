"""The recipes that ship: each loads, and says every key that a user is likely to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from libreflux.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid_and_survives_its_own_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_there_are_recipes() -> None:
    assert RECIPES
