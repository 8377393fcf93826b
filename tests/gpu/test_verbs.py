"""Every verb on the card through the command line, each a process of its own, and its pictures beside the CPU's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gpu.alone import DEVICE, ON_CARD, last_line, libreflux
from gpu.recipes import EMOJI, SIZES
from libreflux.model.facts import read_facts

SIDE = SIZES["emoji"]["resolution"]
DRAW = ["--steps", 6, "--guidance", 3, "--negative", "a rocket", "--width", SIDE, "--height", SIDE]
PROBE = ["--quick", "--prompts", 2, "--pictures", 8, "--guidance", "1,3", "--steps", "2,4", "--resolution", 32]


def difference(one: Path, other: Path) -> float:
    """Mean over all numbers of two pictures, in 1 of 255."""
    with Image.open(one) as a, Image.open(other) as b:
        pixels = [np.asarray(each.convert("RGB"), np.int64) for each in (a, b)]
    assert min(each.std() for each in pixels) > 1  # neither is blank
    return float(np.abs(pixels[0] - pixels[1]).mean())


@dataclass(frozen=True)
class Made:
    """A model's picture from the CPU, and how it was asked for."""

    model: str
    picture: Path


def _drawn(model: str, folder: Path, *options: object, prompt: str = "a red apple on blue") -> Made:
    picture = folder / "cpu.png"
    libreflux("generate", prompt, "--model", model, *DRAW, *options, "--device", "cpu", "--out", picture)
    return Made(model, picture)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a model that is stored in int8."""
    return _drawn("emoji-libre", tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training of recipes/emoji.yaml on the card, samples and held-out pictures included."""
    folder = tmp_path_factory.mktemp("trained")
    small = {"resolution": SIDE, "batch": SIZES["emoji"]["batch"], "steps": 4, "optimizer.warmup": 0}
    small |= {"save.every": 2, "save.averages_every": 2, "samples.every": 4, "samples.guidance": "[3]"}
    small |= {
        "held_out.every": 4,
        "held_out.pictures": 4,
        "data.0.path": photos,
        "out": folder / "run",
        "device": DEVICE,
    }
    recipe = [EMOJI, *(f"{key}={value}" for key, value in small.items())]
    told = libreflux("train", *recipe, "--dry-run").out
    assert ("device memory at its peak" if ON_CARD else "CPU memory at its peak") in told
    libreflux("train", *recipe)
    return folder / "run"


@pytest.fixture(scope="module")
def merged(run: Path) -> Made:
    """A dense model, in bf16 or wider."""
    out = run.parent / "merged"
    libreflux("merge", "emoji-base", run, "--out", out)
    assert read_facts(out).lineage["base"] == "emoji-base"
    return _drawn(str(out), run.parent)


def _again(made: Made, out: Path, *options: object) -> Path:
    libreflux(
        "generate", "a red apple on blue", "--model", made.model, *DRAW, *options, "--device", DEVICE, "--out", out
    )
    return out


def test_generate(emoji: Made, tmp_path: Path) -> None:
    assert difference(_again(emoji, tmp_path / "again.png"), emoji.picture) < 1


def test_generate_with_the_transformer_waiting_in_ram(emoji: Made, tmp_path: Path) -> None:
    if not ON_CARD:
        command = ["generate", "a fox", "--offload", "model", "--device", DEVICE, "--out", tmp_path / "a.png"]
        assert "--offload: model is of no use on cpu" in last_line(libreflux(*command, code=2))
        return
    assert difference(_again(emoji, tmp_path / "again.png", "--offload", "model"), emoji.picture) < 1


@pytest.mark.usefixtures("needs_card")
def test_generate_with_a_transformer_that_comes_layer_by_layer(merged: Made, tmp_path: Path) -> None:
    assert difference(_again(merged, tmp_path / "again.png", "--offload", "sequential"), merged.picture) < 1


def test_generate_quantised(merged: Made, tmp_path: Path) -> None:
    here = _drawn(merged.model, tmp_path, "--quantize", "int8")
    assert difference(_again(merged, tmp_path / "again.png", "--quantize", "int8"), here.picture) < 1


def test_remake(emoji: Made, tmp_path: Path) -> None:
    out = tmp_path / "again.png"
    done = libreflux("generate", "--remake", emoji.picture, "--device", DEVICE, "--out", out)
    assert difference(out, emoji.picture) < 1
    assert ("the device was cpu" in done.err) is ON_CARD


def test_grid(tmp_path: Path) -> None:
    size = ["--width", SIDE, "--height", SIDE]
    common = ["grid", "a fox", "a red apple", "--guidance", "1,3", "--steps", 4, *size]
    for device in ("cpu", DEVICE):
        libreflux(*common, "--device", device, "--out", tmp_path / f"of-{device}")
    if ON_CARD:
        assert difference(tmp_path / f"of-{DEVICE}" / "grid.png", tmp_path / "of-cpu" / "grid.png") < 1
    assert len(list((tmp_path / f"of-{DEVICE}" / "cells").iterdir())) == 4


def _shards(cache: Path, kind: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in cache.glob(f"shards/{kind}-*.safetensors"):
        found |= load_file(shard)
    return found


def test_prepare(photos: Path, tmp_path: Path) -> None:
    """Latents, and texts that a card may encode in bf16: its rounding is below the tolerance."""
    caches = [tmp_path / name for name in ("here", "there")]
    for cache, device in zip(caches, ("cpu", DEVICE), strict=True):
        libreflux("prepare", photos, "--out", cache, "--resolution", SIDE, "--device", device)
    for kind, tolerance in (("latents", 0.01), ("texts", 0.05)):
        here, there = (_shards(cache, kind) for cache in caches)
        assert here.keys() == there.keys()
        assert len(here) >= 40
        assert torch.stack([each.float().norm() for each in here.values()]).min() > 0
        for name, tensor in here.items():
            error = (there[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert error < tolerance, f"{name}: {error:.2e}"


def test_train_wrote_what_it_should(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and 0 < row["gradient_norm"] < 1e3 for row in rows)
    assert (run / "held_out.jsonl").read_text(encoding="utf-8").count("\n") == 2
    with Image.open(run / "samples" / "step-00000004.png") as sheet:
        assert np.asarray(sheet.convert("RGB"), np.int64).std() > 1


def test_average_and_export(run: Path, merged: Made, tmp_path: Path) -> None:
    libreflux("average", run, "--width", 0.1, "--out", tmp_path / "averaged.safetensors")
    libreflux(
        "export", tmp_path / "averaged.safetensors", "--for", "comfyui", "--out", tmp_path / "comfyui.safetensors"
    )
    libreflux("export", merged.model, "--int8", "--out", tmp_path / "int8")
    for file in ("averaged.safetensors", "comfyui.safetensors"):
        tensors = load_file(tmp_path / file)
        assert tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    again = _again(Made(str(tmp_path / "int8"), merged.picture), tmp_path / "again.png")
    assert difference(again, _drawn(merged.model, tmp_path, "--quantize", "int8").picture) < 1


def test_probe(tiny_model_dir: Path, photos: Path, tmp_path: Path) -> None:
    losses: list[dict[str, float]] = []
    for device in ("cpu", DEVICE):
        out = tmp_path / f"of-{device}"
        done = libreflux("probe", tiny_model_dir, "--data", photos, *PROBE, "--device", device, "--out", out, "--json")
        measures = [row for row in json.loads(done.out)["measures"] if row["name"] == "loss"]
        losses.append({json.dumps(row["at"], sort_keys=True): row["value"] for row in measures})
    here, there = losses
    assert here.keys() == there.keys()
    assert len(here) > 4
    for at, value in here.items():
        assert there[at] == pytest.approx(value, rel=0.02), at


def test_demo_data(tmp_path: Path) -> None:
    libreflux("demo-data", tmp_path / "photos", "--count", 3)
    assert len(list((tmp_path / "photos").glob("*.png"))) == 3
