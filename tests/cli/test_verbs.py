"""The verbs that draw, merge, prepare and average, and `demo-data`, as a user runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import libreflux
from libreflux.model.quantise import quantise_folder
from libreflux.sample.metadata import read_record


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_version_and_help(run: Callable) -> None:
    assert run("--version").out.strip() == f"libreflux {libreflux.__version__}"
    for verb in ("generate", "prepare", "train", "merge", "average", "probe", "demo-data"):
        assert verb in run().out
        assert "Usage" in run(verb, "--help").out


def test_the_same_command_draws_the_same_bytes_and_the_png_says_how(
    run: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    args = ["generate", "a red apple on blue", "--model", tiny_model_dir, "--seed", 1, "--negative", "fox", "--out"]
    for name in ("a.png", "b.png"):
        assert run(*args, tmp_path / name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run(*args[:4], "--seed", 2, "--out", tmp_path / "c.png").code == 0
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "c.png")).any()
    record = read_record(tmp_path / "a.png")
    assert (record.prompt, record.negative, record.seed) == ("a red apple on blue", "fox", 1)
    assert (record.steps, record.guidance) == (4, 3.0)  # the model's facts
    assert (record.width, record.height) == Image.open(tmp_path / "a.png").size
    assert len(record.hashes["transformer"]) == 64


def test_a_negative_prompt_is_refused_where_the_models_own_guidance_is_none(
    run: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    facts = json.loads((model / "libreflux.json").read_text())
    (model / "libreflux.json").write_text(json.dumps(facts | {"guidance": 1.0}))
    common = ["generate", "x", "--model", model, "--negative", "fox", "--out", tmp_path / "x.png"]
    refused = run(*common)
    assert refused.code == 2
    assert "--negative: has no effect at guidance 1; hint: " in refused.err
    assert not (tmp_path / "x.png").exists()
    assert run(*common, "--guidance", 2).code == 0


def test_a_pause_of_guidance_that_never_ends_is_refused(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    common = ["generate", "x", "--model", tiny_model_dir, "--out", tmp_path / "x.png", "--negative", "fox"]
    for steps, given in ((["--steps", 2], 2), ([], 4), (["--steps", 1], 1)):  # 4 are the model's own
        refused = run(*common, *steps, "--no-cfg-until", given)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert f"--no-cfg-until: leaves no step of {given} guided; hint: " in refused.err
    assert not (tmp_path / "x.png").exists()
    assert run(*common, "--steps", 2, "--no-cfg-until", 1).code == 0


def test_a_picture_depends_on_its_prompt_and_seed_alone(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_model_dir, "--steps", 2, "--width", 48, "--height", 32]
    many = run("generate", "a fox", "a red apple", "--count", 2, "--seed", 5, *common, "--out", tmp_path / "many")
    assert many.code == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        "001-a-fox-seed5.png",
        "001-a-fox-seed6.png",
        "002-a-red-apple-seed5.png",
        "002-a-red-apple-seed6.png",
    ]
    assert many.out.splitlines() == [str(path) for path in sorted((tmp_path / "many").iterdir())]
    assert run("generate", "a red apple", "--seed", 6, *common, "--out", tmp_path / "one.png").code == 0
    last = tmp_path / "many" / "002-a-red-apple-seed6.png"
    assert (tmp_path / "one.png").read_bytes() == last.read_bytes()
    assert Image.open(last).size == (48, 32)


@pytest.mark.parametrize("verb", ["merge", "generate"])
def test_an_adapter_that_its_run_prunes_after_it_was_read_is_used_as_it_was_read(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from libreflux.files import sha256_file
    from libreflux.model import opening
    from libreflux.model.source import ModelSource
    from libreflux.workflows import drawing

    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(trained.read_bytes())
    opened = opening.open_model

    def prune_first(*args: Any, **kwargs: Any) -> ModelSource:
        adapter.unlink(missing_ok=True)
        return opened(*args, **kwargs)

    monkeypatch.setattr(opening, "open_model", prune_first)
    monkeypatch.setattr(drawing, "open_model", prune_first)
    if verb == "merge":
        done = run("merge", tiny_model_dir, adapter, "--out", tmp_path / "model")
        rows = json.loads((tmp_path / "model" / "libreflux.json").read_text())["lineage"]["adapters"]
    else:
        done = run("generate", "x", "--model", tiny_model_dir, "--adapter", adapter, "--out", tmp_path / "x.png")
        rows = read_record(tmp_path / "x.png").adapters
    assert done.code == 0
    assert not adapter.exists()
    assert [row["sha256"] for row in rows] == [sha256_file(trained)]


def test_merging_equals_attaching(
    run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = run("merge", tiny_model_dir, f"{trained}:0.5", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    facts = json.loads((tmp_path / "merged" / "libreflux.json").read_text())
    (row,) = facts["lineage"]["adapters"]
    assert row["weight"] == 0.5
    assert row["step"] == "3"
    assert len(row["sha256"]) == 64
    draw = ["generate", "a fox", "--seed", 3, "--guidance", 2, "--steps", 3]
    attached = ["--model", tiny_model_dir, "--adapter", f"{trained}:0.5", "--out", tmp_path / "attached.png"]
    assert run(*draw, *attached).code == 0
    assert run(*draw, "--model", tmp_path / "merged", "--out", tmp_path / "merged.png").code == 0
    assert run(*draw, "--model", tiny_model_dir, "--out", tmp_path / "base.png").code == 0
    apart = np.abs(pixels(tmp_path / "attached.png") - pixels(tmp_path / "merged.png"))
    moved = np.abs(pixels(tmp_path / "attached.png") - pixels(tmp_path / "base.png"))
    assert apart.max() <= 1
    assert moved.max() > 1
    int8 = quantise_folder(tiny_model_dir, tmp_path / "int8")
    of_int8 = run("merge", int8, f"{trained}:0.5", "--out", tmp_path / "of-int8")
    assert of_int8.code == 0
    assert "stored in int8" in caplog.text
    one, other = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("merged", "of-int8")
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        apart_by = (other[name].float() - weight.float()).abs().max()
        assert apart_by <= weight.float().abs().max() / 127, name
    again = run("merge", tiny_model_dir, trained, "--out", tmp_path / "merged")
    assert again.code == 2
    assert "already exists" in again.err


def test_an_adapter_brings_its_text_padding(run: Callable, tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    keep = tmp_path / "keep"
    shutil.copytree(tiny_model_dir, keep)
    facts = json.loads((keep / "libreflux.json").read_text()) | {"text_padding": "keep"}
    (keep / "libreflux.json").write_text(json.dumps(facts))
    assert run("generate", "a fox", "--model", keep, "--out", tmp_path / "y.png").code == 0
    assert run("generate", "a fox", "--model", keep, "--adapter", trained, "--out", tmp_path / "x.png").code == 0
    with safe_open(trained, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        other = tmp_path / "trim.safetensors"
        save_file(tensors, other, {**file.metadata(), "text_padding": "trim"})
    clash = run("merge", keep, trained, other, "--out", tmp_path / "m")
    assert clash.code == 2
    assert "text padding" in clash.err
    assert not (tmp_path / "m").exists()


def test_prepare_for_samples_is_no_cache_of_means(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    args = ["prepare", pictures, "--out", tmp_path / "cache", "--model", tiny_model_dir, "--resolution", 32]
    assert run(*args, "--latents", "sample").code == 0
    assert (refused := run(*args)).code == 2
    assert "latents float32 mean and std, now float32; hint: " in refused.err
    unknown = run(*args, "--latents", "mode")
    assert unknown.code == 2
    assert "latents" in unknown.err
    assert unknown.err.count("\n") == 1


def test_prepare_again_finds_nothing_to_do(run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    args = ["prepare", pictures, "--out", tmp_path / "cache", "--model", tiny_model_dir, "--resolution", 32]
    first = run(*args)
    assert first.code == 0
    assert "5 pictures prepared" in first.out
    shards = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert shards
    assert run(*args).code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == shards
    other = run(*args, "--text-padding", "trim")
    assert other.code == 2
    assert "text_padding" in other.err
    more = run(*args[:-1], 48)  # another resolution is more of the same cache
    assert more.code == 0


def test_demo_data_is_an_ordinary_folder_and_a_function_of_its_seed(run: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("demo-data", tmp_path / name, "--count", 3, "--seed", seed).code == 0
    contents = {name: sorted(path.read_bytes() for path in (tmp_path / name).iterdir()) for name in ("a", "b", "c")}
    assert contents["a"] == contents["b"] != contents["c"]
    assert len(list((tmp_path / "a").glob("*.png"))) == len(list((tmp_path / "a").glob("*.txt"))) == 3


def test_average_writes_an_adapter_that_generates(
    run: Callable, trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for option, value in (("--width", 0.1), ("--lerp", 0.5)):
        out = tmp_path / f"{option[2:]}.safetensors"
        made = run("average", trained.parent, option, value, "--out", out)
        assert made.code == 0, made.err
        assert str(out) in made.out
        assert "of its norm" in made.out
        drawn = ["--steps", 1, "--out", tmp_path / f"{option}.png"]
        assert run("generate", "a fox", "--model", tiny_model_dir, "--adapter", out, *drawn).code == 0
        assert "already exists" in run("average", trained.parent, option, value, "--out", out).err
    neither = run("average", trained.parent, "--out", tmp_path / "x.safetensors")
    assert neither.code == 2
    assert "--width" in neither.err
