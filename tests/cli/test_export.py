"""`libreflux export`: what it writes, read by us and by diffusers."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_transformer

from libreflux.adapter.adapter import attach
from libreflux.adapter.io import load_adapter, save_adapter
from libreflux.adapter.layers import linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.model.facts import read_facts
from libreflux.model.int8 import int8_layers
from libreflux.model.opening import open_model
from opened import opened


def test_a_model_goes_to_int8_and_to_diffusers(run: Callable, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert run("export", tiny_model_dir, "--int8", "--out", tmp_path / "small").code == 0
    small = open_model(tmp_path / "small").load_transformer()
    assert int8_layers(small)

    assert run("export", tmp_path / "small", "--for", "diffusers", "--out", tmp_path / "whole").code == 0
    theirs = FluxPipeline.from_pretrained(tmp_path / "whole").transformer
    dense = open_model(tmp_path / "small").load_transformer(quantise=False)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), dense.parameters(), strict=True))


def test_a_family_that_shares_its_parts_is_whole_for_diffusers(run: Callable, tmp_path: Path) -> None:
    done = run("export", "emoji-libre", "--for", "diffusers", "--out", tmp_path / "libre")
    assert done.code == 0, done.err
    theirs = FluxPipeline.from_pretrained(tmp_path / "libre", torch_dtype=torch.bfloat16)
    assert theirs.transformer.dtype == torch.bfloat16
    assert theirs.text_encoder_2 is not None
    assert read_facts(tmp_path / "libre").parts_from is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--int8, --for: one of them is needed"),
        (["--int8", "--for", "diffusers"], "--int8, --for: one of them is needed"),
        (["--for", "paint"], "--for: no program 'paint'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Callable, tiny_model_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run("export", tiny_model_dir, *options, "--out", tmp_path / "x")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)


@pytest.mark.parametrize(("padding", "shift"), [("drop", 1.0), ("trim", 3.0), ("keep", None)])
def test_the_script_beside_an_export_draws_the_same_picture_in_diffusers(
    run: Callable,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    padding: str,
    shift: float | None,
) -> None:
    """Also where the model's shift is not its stored scheduler's, which is 1."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    changed = {"text_padding": padding, "max_tokens": 24, "shift": shift}
    facts = json.loads((model / "libreflux.json").read_text()) | changed
    (model / "libreflux.json").write_text(json.dumps(facts))
    assert run("export", model, "--for", "diffusers", "--out", tmp_path / "out").code == 0
    texts = ["a fox left of a rocket, on yellow", "--negative", "red", "--seed", "5", "--out"]
    assert run("generate", *texts, tmp_path / "ours.png", "--model", model).code == 0
    script = [str(tmp_path / "out" / "draw.py"), *texts, str(tmp_path / "theirs.png")]
    if padding == "drop":
        done = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    else:  # here, where diffusers is imported already
        monkeypatch.setattr(sys, "argv", script)
        runpy.run_path(script[0], run_name="__main__")
        monkeypatch.undo()
    assert np.abs(picture(tmp_path / "ours.png") - picture(tmp_path / "theirs.png")).max() <= 1
    assert run("generate", texts[0], "--out", tmp_path / "other.png", "--model", model).code == 0
    assert np.abs(picture(tmp_path / "ours.png") - picture(tmp_path / "other.png")).max() > 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "python draw.py" in card


def test_a_model_goes_to_comfyui_and_comes_back(run: Callable, tmp_path: Path) -> None:
    done = run("export", "emoji-libre", "--for", "bfl", "--out", tmp_path / "comfy")
    assert done.code == 0, done.err
    names = sorted(path.name for path in (tmp_path / "comfy").iterdir())
    assert names == [
        "ae.safetensors",
        "clip_l.safetensors",
        "flux1-emoji-libre.safetensors",
        "sd1_tokenizer",
        "t5_tokenizer",
        "t5xxl.safetensors",
        "workflow.json",
    ]
    workflow = json.loads((tmp_path / "comfy" / "workflow.json").read_text())
    kinds = {node["class_type"]: node["inputs"] for node in workflow.values()}
    padding = kinds["T5TokenizerOptions"]
    assert padding["min_padding"] == padding["min_length"] == 0
    assert kinds["KSampler"]["cfg"] > 1
    assert kinds["UNETLoader"]["unet_name"] == names[2]
    for node in workflow.values():  # every link leads to a node
        assert all(value[0] in workflow for value in node["inputs"].values() if isinstance(value, list))

    assert run("export", "--comfyui", tmp_path / "comfy", "--for", "diffusers", "--out", tmp_path / "again").code == 0
    once, again = opened("emoji-libre", quantise=False), opened(tmp_path / "again")
    for one, other in ((once.transformer, again.transformer), (once.vae, again.vae)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert again.facts == dataclasses.replace(once.facts, parts_from=None)
    assert run("export", "emoji-libre", "--for", "bfl", "--out", tmp_path / "one.safetensors").code == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "comfy" / names[2]).read_bytes()


def test_an_adapter_goes_out_under_other_names(run: Callable, trained: Path, tmp_path: Path) -> None:
    done = run("export", trained.parent, "--for", "lycoris", "--out", tmp_path / "lycoris.safetensors")
    assert done.code == 0, done.err
    own = load_file(trained)
    assert all(torch.equal(own[name], tensor) for name, tensor in load_file(tmp_path / "lycoris.safetensors").items())
    refused = run("export", trained, "--for", "kohya", "--out", tmp_path / "kohya.safetensors")
    assert refused.code == 2
    assert "add --rank 64" in refused.err
    assert not (tmp_path / "kohya.safetensors").exists()
    done = run("export", trained, "--for", "kohya", "--rank", 2, "--out", tmp_path / "kohya.safetensors")
    assert done.code == 0
    assert "of the adapter is lost" in done.out
    model = load_adapter(trained).metadata["model"]
    command = ["generate", "a red apple", "--model", model, "--adapter", tmp_path / "kohya.safetensors"]
    drawn = run(*command, "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err


def test_what_is_lost_or_not_read_is_printed(run: Callable, tmp_path: Path) -> None:
    flux = tiny_transformer()
    adapter = attach(flux, resolve(linear_shapes(flux), [Target(layers="**", rank=2)]))
    save_adapter(adapter, tmp_path / "lora.safetensors")
    done = run("export", tmp_path / "lora.safetensors", "--for", "kohya", "--out", tmp_path / "kohya.safetensors")
    assert done.code == 0
    assert "lost (Frobenius norm)" not in done.out
    assert "sd-scripts does not read final_layer.adaLN_modulation.1 and 1 more" in done.out
    assert "ranks 2, 6, 8: OneTrainer reads a LoRA of one rank only" in done.out
    done = run("export", tmp_path / "lora.safetensors", "--for", "comfyui", "--rank", 4, "--out", tmp_path / "x")
    assert done.code == 2
    assert "--out" in done.err
    options = ["--for", "comfyui", "--rank", 4, "--out", tmp_path / "x.safetensors"]
    done = run("export", tmp_path / "lora.safetensors", *options)
    assert done.code == 2
    assert "leave out --rank" in done.err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "suffix", ["diff", "diff_b", "lora_down.weight", "lokr_w1_a", "hada_w1_a", "oft_blocks", "alpha"]
)
def test_no_adapter_is_taken_for_a_model(run: Callable, tmp_path: Path, suffix: str) -> None:
    """Of any kind, also one that cannot be exported: then that is said of it."""
    path = tmp_path / "one.safetensors"
    save_file({f"lora_unet_img_in.{suffix}": torch.ones(2, 2)}, path)
    done = run("export", path, "--for", "lycoris", "--out", tmp_path / "out.safetensors")
    assert done.code == 2
    assert "for a model" not in done.err
    assert "img_in" in done.err.replace("x_embedder", "img_in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["emoji-libre", "--for", "kohya"], "no program 'kohya' for a model; hint: use diffusers, bfl"),
        (["RUN", "--for", "bfl"], "no program 'bfl' for an adapter; hint: use comfyui"),
        (["RUN", "--int8"], "--int8: has no effect on an adapter"),
        (["emoji-libre", "--int8", "--rank", "4"], "--rank: has no effect on a model"),
        (["emoji-libre", "--int8", "--base", "emoji-base"], "--base: has no effect without a single file"),
        (["none.safetensors", "--int8"], "none.safetensors: no such file"),
        (["--int8"], "MODEL: nothing to export"),
        (["--comfyui", "nowhere", "--int8"], "nowhere: no such folder"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    run: Callable, trained: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run("export", *[trained if one == "RUN" else one for one in options], "--out", tmp_path / "x")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()
