"""What older versions wrote is opened, reused and gone on with. kept/write.py says how the archives were made."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kept.write import COMMANDS, mean_square
from libreflux.data.cache import CacheWriter
from libreflux.model.int8 import int8_layers
from libreflux.model.opening import open_model
from libreflux.probing import run as probe_run
from libreflux.probing.context import ProbeContext
from libreflux.probing.results import read_result
from libreflux.sample.metadata import read_record
from libreflux.training import checkpoint
from libreflux.workflows import probe_measure
from libreflux.workflows.grid_cells import Cells

ARCHIVES = sorted((Path(__file__).parents[1] / "kept").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=[path.name.partition(".")[0] for path in ARCHIVES])
def kept(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one version, which is the working directory; whoever opens an encoder or draws is stopped."""
    with tarfile.open(request.param) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)

    def refuse(*args: Any) -> None:
        raise AssertionError("made again")

    for where, name in ((CacheWriter, "write_shard"), (Cells, "draw"), (ProbeContext, "draw_batch")):
        monkeypatch.setattr(where, name, refuse)
    return tmp_path


def test_a_run_goes_on_to_its_end_on_its_cache(run: Callable[..., Any], kept: Path) -> None:
    begun = checkpoint.latest(kept / "run")
    assert begun is not None
    assert begun.step == 2
    done = run("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert "resumes after step 2: 4 steps" in done.err
    finished = checkpoint.latest(kept / "run")
    assert finished is not None
    assert finished.step == 4
    steps = [json.loads(line)["step"] for line in (kept / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    averaged = run("average", "run", "--width", "0.1", "--out", "averaged.safetensors")
    assert averaged.code == 0, averaged.err


def test_a_probe_is_whole_and_its_drawings_are_known(
    run: Callable[..., Any], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_result(kept / "probe")
    opened = probe_measure.open_context
    # Of a section whose statistics have changed since then, another file is made, on the pictures that were drawn.
    known = [probe_run.section_file(kept / "probe", one.name) for one in probe_run.SECTIONS if one.version > 1]
    changed = [file for file in known if file.is_file()]
    assert {"guidance", "steps"} <= {file.stem for file in changed}
    anew = {row["name"] for file in changed for row in json.loads(file.read_text())["measures"]}
    for _ in range(2):  # under the key of then, and under today's
        done = run(*COMMANDS["probe"])
        assert done.code == 0, done.err
        rows = [row for row in read_result(kept / "probe").measures if row.name not in anew]
        assert rows == [row for row in before.measures if row.name not in anew]
        monkeypatch.setattr(probe_measure, "open_context", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(probe_measure, "open_context", opened)
    for name in ("guidance", "steps", "diversity"):
        probe_run.section_file(kept / "probe", name).unlink()
    done = run(*COMMANDS["probe"])  # on the pictures that were drawn then
    assert done.code == 0, done.err
    found = read_result(kept / "probe")
    for one in before.measures:
        again = found.find(one.name, one.subset, **one.at)
        assert again is not None
        assert again.value == pytest.approx(one.value, rel=1e-3, abs=1e-6, nan_ok=True)


def test_a_grid_is_not_drawn_again(run: Callable[..., Any], kept: Path) -> None:
    records = [read_record(path) for path in sorted((kept / "grid" / "cells").iterdir())]
    for _ in range(2):
        done = run(*COMMANDS["grid"])
        assert done.code == 0, done.err
        assert "0 of 2 cells drawn now" in done.out, done.err
    now = [read_record(path) for path in (kept / "grid" / "cells").iterdir()]
    assert sorted(now, key=lambda one: one.steps) == sorted(records, key=lambda one: one.steps)


def test_a_grid_with_another_guidance_does_not_take_its_cells(run: Callable[..., Any], kept: Path) -> None:
    before = sorted((kept / "grid" / "cells").iterdir())
    with pytest.raises(AssertionError, match="made again"):
        run(*COMMANDS["grid"], "--nag", "4")
    assert sorted((kept / "grid" / "cells").iterdir()) == before


def test_an_adapter_draws(run: Callable[..., Any], kept: Path) -> None:
    words = ["--adapter", "run/adapter.safetensors", "--steps", 1, "--width", 32, "--height", 32, "--out", "one.png"]
    done = run("generate", "a red apple", *words)
    assert done.code == 0, done.err
    assert [row["file"] for row in read_record(kept / "one.png").adapters] == ["adapter.safetensors"]
    with Image.open(kept / "one.png") as picture:
        assert picture.size == (32, 32)


def test_an_int8_folder_says_the_same(kept: Path) -> None:
    transformer = open_model(kept / "int8").load_transformer(dtype=torch.float32)
    assert int8_layers(transformer)
    told = json.loads((kept / "int8" / "told.json").read_text())["mean_square"]
    assert mean_square(transformer) == pytest.approx(told, rel=1e-3)
