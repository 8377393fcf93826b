"""`--quantize`: what a folder in int8 draws, recorded and drawn again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from libreflux.model.facts import KNOWN, write_facts
from libreflux.sample.metadata import GenerationRecord, read_record
from tiny import tiny_transformer

COMMON = ["a fox", "--guidance", 3, "--steps", 2, "--seed", 4]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def drawn(run: Callable, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "a.png"
    done = run("generate", *COMMON, "--model", tiny_model_dir, "--quantize", "int8", "--out", path)
    assert done.code == 0, done.err
    return path


def test_draws_what_the_exported_model_draws(run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path) -> None:
    assert run("export", tiny_model_dir, "--int8", "--out", tmp_path / "int8").code == 0
    for name, model in (("stored", tmp_path / "int8"), ("dense", tiny_model_dir)):
        assert run("generate", *COMMON, "--model", model, "--out", tmp_path / f"{name}.png").code == 0
    assert pixels(drawn) == pixels(tmp_path / "stored.png") != pixels(tmp_path / "dense.png")
    told = {name: read_record(tmp_path / f"{name}.png") for name in ("stored", "dense")} | {"drawn": read_record(drawn)}
    assert {name: (record.quantize, record.dtype) for name, record in told.items()} == {
        "drawn": ("int8", "int8, float32"),
        "stored": (None, "int8, float32"),
        "dense": (None, "float32"),
    }
    assert told["drawn"].hashes == told["dense"].hashes  # of what is stored
    assert "Quantized: int8" in told["drawn"].parameters()
    assert "Quantized" not in told["stored"].parameters()


def test_w8a8_draws_nearly_the_same_and_is_drawn_again(
    run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path
) -> None:
    path, again = tmp_path / "a.png", tmp_path / "again.png"
    assert run("generate", *COMMON, "--model", tiny_model_dir, "--quantize", "w8a8", "--out", path).code == 0
    told = read_record(path)
    assert (told.quantize, told.dtype) == ("w8a8", "w8a8 (int8), float32")
    with Image.open(path) as image, Image.open(drawn) as other:
        distance = np.abs(np.asarray(image, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    assert 0 < distance.mean() < 4
    assert run("generate", "--remake", path, "--out", again).code == 0
    assert pixels(again) == pixels(path)


def test_the_published_layout_in_shards_and_bf16(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    """LibreFLUX's: its own class name, code that is not run, no facts; as the same weights in an ordinary folder."""
    plain, published = (shutil.copytree(tiny_model_dir, tmp_path / name) for name in ("plain", "published"))
    for folder in (plain, published):
        shutil.rmtree(folder / "transformer")
    transformer = tiny_transformer().to(torch.bfloat16)
    transformer.save_pretrained(plain / "transformer")
    transformer.save_pretrained(published / "transformer", max_shard_size="40KB")
    assert len(list((published / "transformer").glob("*.safetensors"))) > 2
    facts = KNOWN["jimmycarter/LibreFLUX"]
    write_facts(plain, facts)
    (published / "libreflux.json").unlink()
    for name, change in (
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModelWithMasking"}),
        (
            "model_index.json",
            {
                "_class_name": ["pipeline", "LibreFluxPipeline"],
                "transformer": ["transformer", "FluxTransformer2DModelWithMasking"],
            },
        ),
    ):
        path = published / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for code in ("pipeline.py", "transformer/transformer.py"):
        (published / code).write_text("raise SystemExit('run')")
    found: list[tuple[str, Any]] = []
    for model, more in (
        (plain, []),
        (published, []),
        (plain, ["--quantize", "int8"]),
        (published, ["--quantize", "int8"]),
    ):
        out = tmp_path / f"{len(found)}.png"
        done = run("generate", "a fox", "--steps", 2, "--seed", 4, "--model", model, *more, "--out", out)
        assert done.code == 0, done.err
        assert read_record(out).guidance == facts.guidance
        found.append((read_record(out).dtype, pixels(out)))
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0][1] != found[2][1]
    assert (found[0][0], found[2][0]) == ("bfloat16", "int8, bfloat16")


def test_is_done_again_for_a_remake(run: Callable, drawn: Path, tmp_path: Path) -> None:
    again = run("generate", "--remake", drawn, "--out", tmp_path / "b.png")
    assert again.code == 0
    assert "bit for bit" in again.err
    assert " was " not in again.err
    assert (tmp_path / "b.png").read_bytes() == drawn.read_bytes()


def test_an_adapter_goes_on_top(run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_model_dir, "--adapter", trained]
    found = []
    for name, more in (("int8", ["--quantize", "int8"]), ("dense", [])):
        assert run("generate", *COMMON, *options, *more, "--out", tmp_path / f"{name}.png").code == 0
        found.append(pixels(tmp_path / f"{name}.png"))
    assert found[0] != found[1]
    again = run("generate", "--remake", tmp_path / "int8.png", "--adapter", trained, "--out", tmp_path / "again.png")
    assert again.code == 0
    assert pixels(tmp_path / "again.png") == found[0]


def test_grid_cells_of_both_kinds_live_side_by_side(
    run: Callable, tiny_model_dir: Path, drawn: Path, tmp_path: Path
) -> None:
    command = [
        "grid",
        "a fox",
        "--guidance",
        3,
        "--steps",
        2,
        "--seeds",
        4,
        "--model",
        tiny_model_dir,
        "--out",
        tmp_path,
    ]
    for more in ([], ["--quantize", "int8"]):
        assert "1 of 1 cell drawn now" in run(*command, *more).out
    assert "0 of 1 cell" in run(*command, "--quantize", "int8").out
    cells: dict[str | None, tuple[Path, GenerationRecord]] = {
        record.quantize: (path, record) for path in (tmp_path / "cells").iterdir() for record in [read_record(path)]
    }
    path, record = cells["int8"]
    assert pixels(path) == pixels(drawn) != pixels(cells[None][0])
    assert dataclasses.asdict(record) == dataclasses.asdict(read_record(drawn))
