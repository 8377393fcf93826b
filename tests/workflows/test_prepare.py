"""Preparing from Python: what the command writes, and nothing printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libreflux
from libreflux.data.cache import Cache
from libreflux.errors import OptionError
from libreflux.recipe import Recipe
from libreflux.workflows.prepare import PrepareOptions, prepare, recipe_of_options


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


def test_python_and_the_command_write_the_same_shards(
    run: Callable[..., Any], tiny_model_dir: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--crops-per-picture", 2]
    assert run(*command, "--device", "cpu", "--out", tmp_path / "command").code == 0
    capsys.readouterr()
    heard: list[Any] = []
    made = prepare(
        pictures,
        model=str(tiny_model_dir),
        resolution=[32],
        crops_per_picture=2,
        device="cpu",
        out=tmp_path / "python",
        on_source=heard.append,
    )
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")
    assert len(heard) == 1
    assert made.pictures == heard[0].pictures
    assert shards(made.cache) == shards(tmp_path / "command")
    assert Cache(made.cache).settings == Cache(tmp_path / "command").settings


def test_a_recipe_says_everything_but_the_cache() -> None:
    recipe = Recipe.model_validate(
        {"model": "emoji-base", "data": [{"path": "photos"}], "resolution": 64, "steps": 1, "out": "runs/a"}
    )
    assert recipe_of_options(PrepareOptions(recipe, out="elsewhere")).cache_dir == Path("elsewhere")
    with pytest.raises(OptionError, match="latents: the recipe says this"):
        recipe_of_options(PrepareOptions(recipe, latents="sample"))
    with pytest.raises(OptionError, match="out: no cache folder is named; hint: say `out` FOLDER"):
        recipe_of_options(PrepareOptions("photos"))


def test_a_recipe_may_be_a_tree_of_its_keys() -> None:
    tree = {"model": "emoji-base", "data": [{"path": "photos"}], "resolution": 64, "steps": 1, "out": "runs/a"}
    assert recipe_of_options(PrepareOptions(tree)) == recipe_of_options(PrepareOptions(Recipe.model_validate(tree)))
    with pytest.raises(OptionError, match="device: the recipe says this"):
        recipe_of_options(PrepareOptions(tree, device="cpu"))


@pytest.mark.parametrize("data", [3, None, b"photos", [None], ["photos", 3]], ids=str)
def test_what_is_no_data_is_refused(data: Any) -> None:
    with pytest.raises(OptionError, match=r"data: (cannot be|is empty)"):
        libreflux.prepare(data, out="cache")


def test_what_is_not_said_is_as_a_recipe_has_it() -> None:
    recipe = recipe_of_options(PrepareOptions(["a", "b"], out="cache", background="black"))
    assert [(source.path, source.background, source.crops_per_picture) for source in recipe.data] == [
        ("a", "black", 1),
        ("b", "black", 1),
    ]
    assert (recipe.model, recipe.resolution, recipe.crop) == ("emoji-base", (128,), ("square",))
