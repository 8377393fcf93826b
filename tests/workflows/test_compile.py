"""`compile` for pictures: told, recorded, the same when a picture is drawn again, refused where it cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import libreflux
from libreflux.errors import OptionError
from libreflux.model.compile_choice import Work
from libreflux.sample.metadata import CHUNK, GenerationRecord, open_png, read_record
from libreflux.workflows import drawing, drawing_device
from libreflux.workflows.drawing import open_for_drawing

RECORD = GenerationRecord(prompt="a fox", seed=1, steps=4, guidance=3.0, width=32, height=32, model="tiny")


class Stub:
    """In the place of `CompiledBlocks`: compiles nothing, and says that it did once."""

    made = 0

    def __init__(self, transformer: object) -> None:
        type(self).made += 1
        self.lines = ["compiled 2 kinds of block"]

    def news(self) -> str | None:
        return self.lines.pop() if self.lines else None


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setattr(Stub, "made", 0)
    monkeypatch.setattr(drawing, "CompiledBlocks", Stub)
    monkeypatch.setattr(drawing, "missing_compiler", lambda device: None)
    return Stub


def test_a_picture_says_so_and_is_drawn_again_likewise(
    compiler: type[Stub], tiny_model_dir: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    common: dict[str, Any] = {
        "model": tiny_model_dir,
        "steps": 1,
        "count": 2,
        "device": "cpu",
        "on_notice": told.append,
    }
    libreflux.generate("a fox", **common, compile="on", out=tmp_path / "on")
    libreflux.generate("a fox", **common, out=tmp_path / "auto")
    assert told == ["blocks are compiled: 2 kinds, at their first calls", "compiled 2 kinds of block"]
    assert compiler.made == 1
    on, auto = (sorted((tmp_path / name).glob("*.png"))[0] for name in ("on", "auto"))
    assert (read_record(on).compile, read_record(auto).compile) == (True, False)
    assert "Compiled: True" in read_record(on).parameters()
    assert '"compile"' not in open_png(auto).info[CHUNK]  # which older versions read
    again = libreflux.remake(on, out=tmp_path / "again.png")
    assert (again.record.compile, again.differences, compiler.made) == (True, (), 2)
    plain = libreflux.remake(on, compile="off")
    assert (plain.record.compile, compiler.made) == (False, 2)
    assert plain.differences == ("the network was compiled, is plain",)
    assert libreflux.remake(auto).record.compile is False


def test_a_grid_compiles_each_model_once(compiler: type[Stub], tiny_model_dir: Path, tmp_path: Path) -> None:
    done = libreflux.grid(
        "a fox", model=tiny_model_dir, steps=[1, 2], compile="on", device="cpu", out=tmp_path / "grid"
    )
    assert [cell.record.compile for row in done.cells for cell in row] == [True, True]
    assert compiler.made == 1


def test_the_command_passes_it_on(compiler: type[Stub], run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    command = ["generate", "a fox", "--model", tiny_model_dir, "--steps", 1, "--device", "cpu", "--out", path]
    done = run(*command, "--compile", "on")
    assert done.code == 0, done.err
    assert "compiled 2 kinds of block" in done.err
    assert read_record(path).compile is True
    again = run("generate", "--remake", path, "--compile", "off", "--out", tmp_path / "b.png")
    assert "the network was compiled, is plain" in again.err
    assert read_record(tmp_path / "b.png").compile is False


def test_auto_looks_at_all_pictures_together(
    compiler: type[Stub], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU as the card that the decision is made for."""
    source = open_for_drawing(str(tiny_model_dir), device="cpu")
    asked: list[int] = []

    def work_of(transformer: object, passes: int, training: bool) -> Work:
        asked.append(passes)
        return Work(kinds=2, blocks=57, passes=10_000, training=False)

    monkeypatch.setattr(drawing, "work_of", work_of)
    card = dataclasses.replace(source, device=torch.device("cuda"))
    assert card._compiled(None, [RECORD, dataclasses.replace(RECORD, guidance=1.0)]) is not None
    assert asked == [8 + 4]
    assert dataclasses.replace(card, offload="sequential")._compiled(None, [RECORD]) is None
    assert source._compiled(None, [RECORD]) is None
    assert len(asked) == 1  # neither is even looked at


def test_what_cannot_be_compiled_is_refused_before_weights_are_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing_device, "missing_compiler", lambda device: "there is no compiler")
    refused = pytest.raises(OptionError, match=r"^compile on: there is no compiler; hint: set `compile` off$")
    with refused:
        libreflux.generate("a fox", model="no-such-model", device="cpu", compile="on")
    with pytest.raises(OptionError, match=r"^compile: cannot be 'yes'; hint: use one of auto, on, off$"):
        libreflux.generate("a fox", compile="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="does not go with `offload` sequential"):
        drawing_device.refuse_compiling(torch.device("cuda"), "sequential")
    with pytest.raises(OptionError, match="there is no compiler"):
        libreflux.grid("a fox", model=tiny_model_dir, device="cpu", compile="on", out=tmp_path / "grid")
    assert not (tmp_path / "grid").exists()
