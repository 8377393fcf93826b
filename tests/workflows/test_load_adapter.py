"""Adapters from Python, as users name them; what they were trained for goes with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import libreflux
from libreflux.adapter.io import AdapterFile
from libreflux.errors import AdapterError, RecipeError


def test_a_run_folder_a_file_and_a_weight_draw_what_the_command_draws(
    run: Callable[..., Any], tiny_model_dir: Path, trained: Path, tmp_path: Path
) -> None:
    read = libreflux.load_adapter(trained.parent)
    assert isinstance(read, AdapterFile)
    assert read.sha256 == libreflux.load_adapter(str(trained)).sha256
    words = ["--model", tiny_model_dir, "--adapter", f"{trained.parent}:0.5", "--seed", 3, "--steps", 2]
    assert run("generate", "a red apple", *words, "--out", tmp_path / "a.png").code == 0
    pipe = libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir)
    pipe.load_lora_weights(read, "mine", weight=0.5)
    drawn = pipe("a red apple", seeds=[3], num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(tmp_path / "a.png")))
    assert pipe.get_active_adapters() == ["mine"]


def test_an_adapter_brings_its_steps_and_guidance_to_a_distilled_model(tiny_model_dir: Path, trained: Path) -> None:
    pipe = libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir)
    pipe.facts = distilled = dataclasses.replace(pipe.facts, steps=4, guidance=1.0)
    read = libreflux.load_adapter(trained)
    said = read.metadata | {"sampling_steps": "28", "guidance": "3.5"}
    pipe.load_lora_weights(dataclasses.replace(read, metadata=said))
    assert (pipe.facts.steps, pipe.facts.guidance) == (28, 3.5)
    pipe.unload_lora_weights()
    assert pipe.facts == distilled


def test_what_is_no_adapter_is_refused(tiny_model_dir: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter\.safetensors and no checkpoint in this folder"):
        libreflux.load_adapter(tmp_path)
    with pytest.raises(AdapterError, match="no such adapter file"):
        libreflux.load_adapter(tmp_path / "a.safetensors")
    pipe = libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir)
    with pytest.raises(RecipeError, match="weight_name: has no effect"):
        pipe.load_lora_weights(libreflux.load_adapter(trained), weight_name="other.safetensors")


def test_a_pipeline_refuses_a_training_adapter_and_tells_of_other_weights(
    tiny_model_dir: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir)
    read = libreflux.load_adapter(trained)
    with pytest.raises(AdapterError, match="is a training adapter, which is on only while another one is trained"):
        pipe.load_lora_weights(dataclasses.replace(read, metadata=read.metadata | {"role": "training_adapter"}))
    assert pipe.get_active_adapters() == []
    pipe.load_lora_weights(read)
    assert caplog.text == ""
    told = {"model_hash": "0" * 64, "training_adapter": "made.safetensors", "training_adapter_sha256": "abc" * 9}
    pipe.load_lora_weights(dataclasses.replace(read, metadata=read.metadata | told, sha256="loaded by a pipeline"))
    assert "was trained on other weights (0000000000 of" in caplog.text
    assert "was trained with the training adapter made.safetensors (abcabcabca), and is used without it" in caplog.text


def test_a_pipeline_refuses_an_adapter_of_a_merged_model_without_what_was_merged(
    tiny_model_dir: Path, trained: Path
) -> None:
    pipe = libreflux.LibreFluxPipeline.from_pretrained(tiny_model_dir)
    read = libreflux.load_adapter(trained)
    lineage = {"base_sha256": read.metadata["model_hash"], "adapters": [{"sha256": read.sha256, "file": "first"}]}
    told = {"model_hash": "0" * 64, "model": "merged", "base_lineage": json.dumps(lineage)}
    second = dataclasses.replace(read, metadata=read.metadata | told, sha256="1" * 64)
    with pytest.raises(AdapterError, match="was trained on merged, which is this model with first merged in"):
        pipe.load_lora_weights(second)
    pipe.load_lora_weights(read)
    pipe.load_lora_weights(second)
    assert len(pipe.get_active_adapters()) == 2
