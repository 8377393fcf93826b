"""One adapter merged into an int8 base, and another trained on the result: what goes together is known, and told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import libreflux
from libreflux.adapter.adapter import attach
from libreflux.adapter.io import attach_file, save_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError, OptionError, RecipeError
from libreflux.files import sha256_file
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.source import ModelSource
from libreflux.workflows.adapters import check_base, load_arguments
from libreflux.workflows.merge import MergeResult
from model.random_inputs import run as velocity_of
from tiny import change_json

LAYERS = "single_transformer_blocks.*.attn.**"


def write_adapter(model: Path, path: Path, *, seed: int = 1, size: float = 0.15) -> Path:
    """An adapter that was, as it says, trained on this model, and changes it visibly."""
    source = open_model(model)
    transformer = source.load_transformer(quantise=False, dtype=torch.float32)
    adapter = attach(transformer, resolve(linear_shapes(transformer), [Target(layers=LAYERS, factor=2)]), init="ones")
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=draw))
    save_adapter(adapter, path, {"model": str(model), "model_hash": source.hash})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, folder: Path) -> Path:
    """The tiny model as published ones are, in bf16, and then in int8."""
    dense = shutil.copytree(tiny_model_dir, folder / "dense")
    open_model(dense).load_transformer(dtype=torch.bfloat16).save_pretrained(dense / "transformer")
    return quantise_folder(dense, folder / "base")


@pytest.fixture(scope="module")
def first(base: Path, folder: Path) -> Path:
    return write_adapter(base, folder / "first.safetensors")


@pytest.fixture(scope="module")
def merged(base: Path, first: Path, folder: Path) -> dict[str, MergeResult]:
    """The first stage's model as it is stored in each dtype."""
    return {name: libreflux.merge(str(base), first, out=folder / name, dtype=name) for name in ("int8", "bf16", "fp32")}


@pytest.fixture(scope="module")
def second(merged: dict[str, MergeResult], pictures: Path, folder: Path) -> Path:
    """A run of one step on the first stage's model."""
    recipe = {
        "model": str(merged["bf16"].out),
        "base": "int8",
        "data": [{"path": str(pictures)}],
        "resolution": 32,
        "adapter": {"targets": [{"layers": LAYERS, "factor": 4}]},
        "batch": 2,
        "steps": 1,
        "out": str(folder / "second"),
    }
    return libreflux.train(recipe, overrides=["samples.every=0"]).run


def velocity(source: ModelSource, adapter: Path | None = None) -> torch.Tensor:
    transformer = source.load_transformer(quantise=False, dtype=torch.float32)
    if adapter is not None:
        attach_file(transformer, adapter, dtype=torch.float32)
    with torch.no_grad():
        return velocity_of(transformer)


@pytest.mark.parametrize("dtype", ["int8", "fp32"])
def test_the_second_stage_starts_where_the_first_one_ended(
    base: Path, first: Path, merged: dict[str, MergeResult], dtype: str
) -> None:
    ended, begun = velocity(open_model(base), first), velocity(open_model(merged[dtype].out))
    change = (ended - velocity(open_model(base))).norm()
    told = merged[dtype].stored.error or 1e-3
    assert (begun - ended).norm() <= 2 * told * change  # of the weights; the network may stretch it
    assert 0 < merged["bf16"].stored.error < merged["int8"].stored.error < 0.2
    assert merged["bf16"].in_int8.error == pytest.approx(merged["int8"].stored.error, rel=0.1)
    assert merged["fp32"].stored.error == 0


def test_what_the_result_says_of_itself(base: Path, first: Path, merged: dict[str, MergeResult], second: Path) -> None:
    lineage = open_model(merged["int8"].out).facts.lineage
    assert [row["sha256"] for row in lineage["adapters"]] == [sha256_file(first)]
    assert lineage["base_sha256"] == open_model(base).hash
    with safe_open(second / "adapter.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["base_lineage"])
    assert told == json.loads(json.dumps(open_model(merged["bf16"].out).facts.lineage))


def test_both_stages_are_shipped_as_one_model(
    base: Path, first: Path, merged: dict[str, MergeResult], second: Path, tmp_path: Path
) -> None:
    on_top = libreflux.merge(str(merged["fp32"].out), second, out=tmp_path / "on-top").out
    at_once = libreflux.merge(str(base), [first, second], out=tmp_path / "at-once", dtype="fp32").out
    names = [row["file"] for row in open_model(at_once).facts.lineage["adapters"]]
    assert names == ["first.safetensors", "adapter.safetensors"]
    lineage = open_model(on_top).facts.lineage
    assert lineage["base_lineage"]["adapters"][0]["sha256"] == sha256_file(first)
    assert "base_lineage" not in lineage["adapters"][0]
    torch.testing.assert_close(velocity(open_model(on_top)), velocity(open_model(at_once)), rtol=0, atol=1e-5)
    shipped = libreflux.export(str(on_top), int8=True, out=tmp_path / "shipped").out
    assert open_model(shipped).facts.lineage["quantised"]["sha256"] == open_model(on_top).hash


def test_a_second_stage_is_refused_where_the_first_one_lacks(
    base: Path, second: Path, merged: dict[str, MergeResult], tmp_path: Path, run: Callable
) -> None:
    with pytest.raises(AdapterError, match=r"is this model with first\.safetensors merged in") as refused:
        libreflux.merge(str(base), second, out=tmp_path / "wrong")
    assert refused.value.hint == f"use it on {merged['bf16'].out}, or together with first.safetensors"
    assert not (tmp_path / "wrong").exists()
    done = run("generate", "a fox", "--model", base, "--adapter", second, "--out", tmp_path / "a.png")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "first.safetensors" in done.err


def warned(caplog: pytest.LogCaptureFixture, model: Path, *adapters: Path) -> str:
    caplog.clear()
    source = open_model(model)
    check_base(source, source.hash, load_arguments([*adapters]))
    return caplog.text


def test_what_belongs_together_is_silent_and_what_is_odd_is_told(
    base: Path,
    first: Path,
    second: Path,
    merged: dict[str, MergeResult],
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = merged["bf16"].out
    assert warned(caplog, stage, second) == ""
    assert warned(caplog, quantise_folder(stage, tmp_path / "small"), second) == ""
    assert warned(caplog, base, first, second) == ""
    assert "is merged into" in warned(caplog, stage, first)
    assert "was trained on other weights" in warned(caplog, tiny_model_dir, first)
    damaged = shutil.copytree(stage, tmp_path / "damaged")
    change_json(damaged / "libreflux.json", lineage={"adapters": "none", "base_sha256": 1, "quantised": []})
    assert warned(caplog, damaged, second) == ""


def test_an_adapter_that_is_merged_in_is_no_start(
    first: Path, merged: dict[str, MergeResult], pictures: Path, tmp_path: Path
) -> None:
    recipe = {"model": str(merged["bf16"].out), "data": [{"path": str(pictures)}], "resolution": 32, "steps": 1}
    recipe |= {"adapter": {"init_from": str(first)}, "out": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=r"first\.safetensors is merged into .* already"):
        libreflux.dry_run(recipe)


def test_what_rounding_loses_is_told_and_warned_of(
    base: Path, tmp_path: Path, run: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    small = write_adapter(base, tmp_path / "small.safetensors", size=0.004)
    done = run("merge", base, small, "--out", tmp_path / "coarse", "--dtype", "int8", "--layers")
    assert done.code == 0, done.err
    assert "rounded to int8: " in done.out
    assert "base: int8" not in done.out
    assert done.out.count("single_transformer_blocks.") == 6
    assert "int8 rounding loses" in caplog.text
    caplog.clear()
    fine = libreflux.merge(str(base), small, out=tmp_path / "fine", dtype="fp32")
    assert fine.in_int8.share < 0.9
    assert not caplog.records
    wrong = run("merge", base, small, "--out", tmp_path / "none", "--dtype", "int4")
    assert wrong.code == 2
    assert "use int8, bf16, fp16, fp32" in wrong.err
    with pytest.raises(OptionError):
        libreflux.merge(str(base), small, out=tmp_path / "none", dtype="int4")
