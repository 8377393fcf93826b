"""`libreflux grid`: what it draws, what it does not draw again, what its page tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from libreflux.sample.metadata import GenerationRecord, read_record, save_png
from libreflux.workflows.grid_cells import Cell, Cells, Column, Row
from tiny import DECIDING, UNDECIDING, change_json


def test_cells_are_what_generate_draws_and_are_drawn_once(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out, evil = tmp_path / "grid", 'a <b>cat</b> & "dog"'
    command = ["grid", "a cat", evil, "--model", tiny_model_dir, "--steps", "1,2", "--seeds", "0:1", "--out", out]
    first = run(*command, "--guidance", "1:3:2")
    assert first.code == 0, first.err
    assert "16 of 16 cells drawn now" in first.out
    cells = {file: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    assert len(cells) == 16

    one = next(
        file for file in cells if (o := read_record(file)).prompt == evil and (o.steps, o.guidance, o.seed) == (2, 3, 1)
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
    assert "9 of 24 cells drawn now" in again.out
    assert all(file.stat().st_mtime_ns == when for file, when in cells.items() if file != one)

    page = (out / "index.html").read_text("utf-8")
    assert evil not in page
    assert "&lt;b&gt;cat" in page
    assert "<script" not in page
    assert page.count('type="radio"') == 6
    assert page.count("<figure") == 24
    assert "CFG scale: 4" in page
    with Image.open(out / "grid.png") as sheet:
        side = read_record(one).width
        assert sheet.width > 6 * side
        assert sheet.height > 4 * side


def blank(cells: Cells, column: Column, row: Row, on_step: Any) -> Cell:
    """In a drawing's place, where only whether it is drawn is asked."""
    steps, scale = (getattr(cells.model(column), name)(column) for name in ("steps", "guidance"))
    record = GenerationRecord(
        prompt=row.prompt, seed=row.seed, steps=steps, guidance=scale, width=16, height=16, model=column.model
    )
    save_png(Image.new("RGB", (16, 16)), path := cells.path(column, row), record)
    cells.made += 1
    return Cell(path, record)


def test_a_cell_is_drawn_anew_when_anything_that_decides_it_changes(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cells, "draw", blank)
    model, out = tmp_path / "model", tmp_path / "grid"
    shutil.copytree(tiny_model_dir, model)
    command = ["grid", "a cat", "--steps", 1, "--out", out, "--model"]

    def drawn(*words: Any) -> bool:
        done = run(*command, *words)
        assert done.code == 0, done.err
        return "1 of 1 cell drawn now" in done.out

    assert drawn(model)
    assert not drawn(model)
    for name, change in UNDECIDING.items():
        change(model)
        assert not drawn(model), name
    moved = model.rename(tmp_path / "moved")
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(before + 1)
        assert not drawn(moved)
        assert not drawn(moved, "--device", "cpu")
    finally:
        torch.set_num_threads(before)
    for name, change in DECIDING.items():
        change(moved)
        assert drawn(moved), name
        assert not drawn(moved), name
    for words in (["--guidance", 2], ["--negative", "a dog", "--guidance", 2], ["--width", 48], ["--seeds", 1]):
        assert drawn(moved, *words), words
        assert not drawn(moved, *words), words
    change_json(moved / "libreflux.json", guidance=2.0)  # what a cell names itself is not the model's to change
    assert not drawn(moved, "--guidance", 2)


def test_own_steps_and_guidance_are_the_models_own_of_today(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cells, "draw", blank)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    for facts in ({"steps": 1}, {"steps": 2}, {"guidance": 2}):
        change_json(model / "libreflux.json", **facts)
        done = run("grid", "a cat", "--model", model, "--out", tmp_path / "grid")
        assert "1 of 1 cell drawn now" in done.out
    assert {(o.steps, o.guidance) for o in map(read_record, (tmp_path / "grid" / "cells").iterdir())} == {
        (1, 3.0),
        (2, 3.0),
        (2, 2.0),
    }


def test_two_models_of_equal_transformers_have_cells_of_their_own(
    run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    models = [tmp_path / "one", tmp_path / "two"]
    for model in models:
        shutil.copytree(tiny_model_dir, model)
    DECIDING["VAE"](models[1])
    command = ["grid", "a cat", "--model", models[0], "--model", models[1], "--steps", 1, "--out", tmp_path / "grid"]
    assert "2 of 2 cells drawn now" in run(*command).out
    assert "0 of 2 cells drawn now" in run(*command).out
    page = (tmp_path / "grid" / "index.html").read_text("utf-8")
    assert ">one, guidance" in page
    assert ">two, guidance" in page


def test_a_grid_has_one_bar(run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    done = run("grid", "a cat", "a dog", "--model", tiny_model_dir, "--steps", "1,2", "--out", tmp_path / "grid")
    assert [line for line in done.err.splitlines() if line.startswith("drawing:")] == [
        line for line in done.err.splitlines() if line.startswith("drawing: 6/6, ") and line.endswith("cell 4 of 4")
    ]
    assert done.err.count("drawing:") == 1


def test_bad_input_is_one_line(run: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--width", 100], "--width: 100 is not a multiple of 16"),
        (["--steps", 0], "--steps: cannot be 0"),
        (["--seeds", "1.5"], "--seeds: cannot be 1.5"),
        (["--model", "no/such/model/here"], "no such model"),
        (["--adapter", "no.safetensors"], "no such adapter file"),
    ):
        done = run("grid", "x", "--model", tiny_model_dir, *options, "--out", tmp_path / "g")
        assert done.code == 2
        assert message in done.err
        assert not (tmp_path / "g").exists()
