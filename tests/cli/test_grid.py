"""`libreflux grid`: what it draws, what it does not draw again, what its page tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux.cli.grid import numbers
from libreflux.errors import RecipeError
from libreflux.sample.metadata import read_origin


def test_cells_are_what_generate_draws_and_are_drawn_once(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out, evil = tmp_path / "grid", 'a <b>cat</b> & "dog"'
    command = ["grid", "a cat", evil, "--model", tiny_model_dir, "--steps", "1,2", "--seeds", "0:1", "--out", out]
    first = run(*command, "--guidance", "1:3:2")
    assert first.code == 0, first.err
    assert "16 of 16 cells were drawn now" in first.out
    cells = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert len(cells) == 16

    one = next(
        file for file in cells if (o := read_origin(file)).prompt == evil and (o.steps, o.guidance, o.seed) == (2, 3, 1)
    )
    alone = tmp_path / "alone.png"
    command_alone = [
        "generate",
        evil,
        "--model",
        tiny_model_dir,
        "--steps",
        2,
        "--guidance",
        3,
        "--seed",
        1,
        "--out",
        alone,
    ]
    assert run(*command_alone).code == 0
    with Image.open(one) as ours, Image.open(alone) as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))

    # Torn, and one more column: only what is missing is drawn.
    one.write_bytes(one.read_bytes()[:50])
    again = run(*command, "--guidance", "1,3,4")
    assert "9 of 24 cells were drawn now" in again.out
    assert all(file.stat().st_mtime_ns == when for file, when in cells.items() if file != one)

    page = (out / "index.html").read_text("utf-8")
    assert evil not in page and "&lt;b&gt;cat" in page and "<script" not in page
    assert page.count('type="radio"') == 6 and page.count("<figure") == 24
    assert "CFG scale: 4" in page
    with Image.open(out / "grid.png") as sheet:
        side = read_origin(one).width
        assert sheet.width > 6 * side and sheet.height > 4 * side


def test_ranges_and_lists() -> None:
    assert numbers("x", "1:6:1") == [1, 2, 3, 4, 5, 6]
    assert numbers("x", "1,3.5,1") == [1, 3.5]
    assert numbers("x", "0:0.3:0.1") == [0, 0.1, 0.2, 0.3]
    for wrong in ("", "a", "1:2:3:4", "3:1", "1:2:0", "1:2:-1", "nan", "0:inf", "-1", "0:1e9"):
        with pytest.raises(RecipeError, match="x: "):
            numbers("x", wrong)
    with pytest.raises(RecipeError, match=r"cannot be 1\.5"):
        numbers("x", "1.5", whole=True)


def test_bad_input_is_one_line(run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--width", 100], "--width: 100 is not a multiple of 16"),
        (["--steps", 0], "--steps: cannot be 0"),
        (["--seeds", "1.5"], "--seeds: cannot be 1.5"),
    ):
        done = run("grid", "x", "--model", tiny_model_dir, *options, "--out", tmp_path / "g")
        assert done.code == 2 and message in done.err and not (tmp_path / "g").exists()
