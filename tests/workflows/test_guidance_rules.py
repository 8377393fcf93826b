"""APG and CFG-Zero* through the workflows: records, drawing again, grids, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import libreflux
from libreflux.errors import OptionError
from libreflux.sample.metadata import read_record

APG = {"guidance_rule": "apg", "apg_eta": 0.25, "apg_radius": 2.0}
ZERO = {"guidance_rule": "cfg-zero", "zero_init": 1}


def picture(model: Path, **options: Any) -> np.ndarray:
    image = libreflux.generate("a fox", model=model, steps=2, guidance=3, **options).pictures[0].image
    assert image is not None
    return np.asarray(image)


def test_apg_that_is_neutral_draws_the_picture_of_cfg(tiny_model_dir: Path) -> None:
    neutral = picture(tiny_model_dir, guidance_rule="apg", apg_eta=1.0, apg_momentum=0.0)
    assert np.array_equal(neutral, picture(tiny_model_dir))


@pytest.mark.parametrize("options", [APG, ZERO])
def test_a_picture_says_its_rule_and_is_drawn_again(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "a.png"
    libreflux.generate("a fox", model=tiny_model_dir, steps=2, guidance=3, out=out, **options)
    record = read_record(out)
    assert {name: getattr(record, name) for name in options} == options
    assert libreflux.remake(out).same_pixels


def test_a_picture_without_a_rule_says_nothing_of_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    libreflux.generate("a fox", model=tiny_model_dir, steps=1, out=tmp_path / "a.png")
    text = Image.open(tmp_path / "a.png").info["libreflux"]
    assert not any(name in text for name in ("guidance_rule", "apg_", "zero_init", "nag", "first_steps"))


def test_a_grid_has_a_cell_of_its_own_for_a_rule(tiny_model_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": tiny_model_dir, "steps": [1], "guidance": [3], "out": tmp_path / "grid"}
    libreflux.grid("a fox", **common)
    drawn = libreflux.grid("a fox", guidance_rule="apg", **common)
    assert drawn.drawn == 1
    assert drawn.cells[0][0].record.apg_momentum == -0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"guidance_rule": "pag"}, "guidance_rule: cannot be 'pag'"),
        ({"apg_eta": 0.5}, "apg_eta: is read by `guidance_rule` apg alone"),
        ({"guidance_rule": "apg", "apg_radius": 0}, "apg_radius: cannot be 0"),
        ({"guidance_rule": "apg", "apg_momentum": 1}, "apg_momentum: cannot be 1"),
        ({"guidance_rule": "apg", "zero_init": 1}, "zero_init: is read by `guidance_rule` cfg-zero alone"),
        ({"guidance_rule": "cfg-zero", "zero_init": 4, "steps": 4}, "zero_init: leaves no step of 4"),
        ({"guidance_rule": "apg", "guidance": 1}, "guidance_rule: has no effect at guidance 1"),
    ],
)
def test_refused(tiny_model_dir: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError) as error:
        libreflux.generate("a fox", model=tiny_model_dir, **options)
    assert str(error.value).startswith(told)
