"""Guidance without freeing through the workflows: records, drawing again, grids, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import libreflux
from libreflux.errors import LibrefluxError, OptionError
from libreflux.sample.metadata import read_record
from tiny import make_tiny_model

NAG: dict[str, Any] = {"nag": 4.0, "nag_tau": 2.0, "nag_alpha": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same size, as the base of a distilled one is."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base", seed=7)


def test_nag_is_recorded_and_drawn_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    libreflux.generate("a fox", model=tiny_model_dir, steps=2, guidance=1, negative="a tree", out=out, **NAG)
    record = read_record(out)
    assert {name: getattr(record, name) for name in NAG} == NAG
    assert record.passes == 4
    assert "NAG scale: 4" in Image.open(out).info["parameters"]
    assert libreflux.remake(out).same_pixels


def test_nag_on_a_quantised_model(tiny_model_dir: Path) -> None:
    common: dict[str, Any] = {"model": tiny_model_dir, "steps": 1, "guidance": 1, "quantize": "w8a8"}
    plain, guided = (libreflux.generate("a fox", **common, **more).pictures[0].image for more in ({}, NAG))
    assert np.any(np.asarray(plain) != np.asarray(guided))


def test_first_steps_are_recorded_and_drawn_again(tiny_model_dir: Path, base: Path, tmp_path: Path) -> None:
    out, moved = tmp_path / "a.png", tmp_path / "moved"
    options: dict[str, Any] = {"steps": 3, "guidance": 1, "negative": "a tree"}
    libreflux.generate("a fox", model=tiny_model_dir, first_steps_from=f"{base}:2", out=out, **options)
    record = read_record(out)
    assert (record.first_steps_from, record.first_steps_guidance, record.passes) == (f"{base}:2", 3.0, 5)
    assert record.hashes["first_transformer"] != record.hashes["transformer"]
    moved.symlink_to(base)
    assert libreflux.remake(out, first_steps_from=str(moved)).same_pixels


def test_a_grid_and_a_folder_take_them(tiny_model_dir: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n")
    more: dict[str, Any] = {"nag": 4.0, "first_steps_from": str(base), "negative": "a tree"}
    grid: dict[str, Any] = {"model": tiny_model_dir, "steps": [2], "guidance": [1], "out": tmp_path / "grid"}
    libreflux.grid("a fox", **grid)
    found = libreflux.grid("a fox", **grid, **more)
    assert (found.drawn, libreflux.grid("a fox", **grid, **more).drawn) == (1, 0)
    assert found.cells[0][0].record.first_steps_from == f"{base}:1"
    folder: dict[str, Any] = {"model": tiny_model_dir, "steps": 2, "guidance": 1, "out": tmp_path / "f"}
    assert libreflux.generate_folder(tmp_path / "p.txt", **folder, **more).drawn == 1
    alone = libreflux.generate("a fox", model=tiny_model_dir, steps=2, guidance=1, **more).pictures[0].image
    assert np.array_equal(np.asarray(alone), np.asarray(Image.open(found.cells[0][0].path)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"nag": -1}, "nag: cannot be -1"),
        ({"nag_tau": 2}, "nag_tau: has no effect without `nag`"),
        ({"nag": 4, "nag_tau": 0.5}, "nag_tau: cannot be 0.5"),
        ({"nag": 4, "nag_alpha": 0}, "nag_alpha: of 0 leaves `nag` without effect"),
        ({"nag": 4, "compile": "on"}, "compile on: does not go with `nag`"),
        ({"guidance": 1, "negative": "x"}, "negative: has no effect at guidance 1"),
        ({"first_steps_guidance": 3}, "first_steps_guidance: has no effect without `first_steps_from`"),
        ({"first_steps_from": "emoji-base:0"}, "first_steps_from: draws no step"),
        ({"first_steps_from": "emoji-base:4", "steps": 4}, "first_steps_from: leaves none of 4 steps"),
        (
            {"first_steps_from": "emoji-base:2", "guidance_rule": "cfg-zero", "zero_init": 2},
            "zero_init: has no effect: `first_steps_from` draws the first 2 steps",
        ),
        ({"first_steps_from": "SELF", "offload_blocks": "auto"}, "offload_blocks: does not go with"),
        ({"first_steps_from": "SELF", "first_steps_guidance": 1, "guidance": 1, "negative": "x"}, "negative: has no"),
    ],
)
def test_refused(tiny_model_dir: Path, options: dict[str, Any], told: str) -> None:
    options = {name: str(tiny_model_dir) if value == "SELF" else value for name, value in options.items()}
    with pytest.raises(OptionError) as error:
        libreflux.generate("a fox", model=tiny_model_dir, **options)
    assert str(error.value).startswith(told)


def test_a_first_model_of_other_latents_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(LibrefluxError, match="draws in other latents than the model"):
        libreflux.generate("a fox", model=tiny_model_dir, first_steps_from="emoji-base")
