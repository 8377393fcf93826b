"""What of a model decides a picture: of folders see the tests of grid and probe, which keep pictures by it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libreflux import files
from libreflux.adapter.io import load_adapter
from libreflux.adapter.peft import CONFIG, FILES
from libreflux.data.digests import FileMemory
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles, find_comfyui
from libreflux.sample.model_key import adapters_key, model_key
from opened import opened
from tiny import change_json

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def comfyui(tiny_model_dir: Path, tmp_path: Path) -> SingleFiles:
    """The tiny model in single files of its own."""
    opened(tiny_model_dir).save_files(tmp_path / "flat")
    return find_comfyui(tmp_path / "flat")


def one_percent_larger(file: Path) -> None:
    with torch.no_grad():
        found = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(found, file, metadata)


def moved(files_: SingleFiles, folder: Path) -> SingleFiles:
    """The same files in another place."""
    shutil.copytree(files_.transformer.parent, folder)
    return find_comfyui(folder)


def test_single_files_are_known_by_what_is_in_them(comfyui: SingleFiles, tiny_model_dir: Path, tmp_path: Path) -> None:
    before = model_key(open_model(comfyui), FileMemory(tmp_path))
    assert model_key(open_model(moved(comfyui, tmp_path / "moved")), FileMemory(tmp_path)) == before
    other_base = dataclasses.replace(comfyui, tokenizer_2=None, base=str(tiny_model_dir))
    assert model_key(open_model(other_base), FileMemory(tmp_path))["transformer"] == before["transformer"]
    vae, t5 = comfyui.vae, comfyui.text_encoder_2
    assert vae is not None
    assert t5 is not None
    changed: dict[str, Callable[[], None]] = {
        "vae": lambda: one_percent_larger(vae),
        "text_encoders": lambda: one_percent_larger(t5),
        "transformer": lambda: one_percent_larger(comfyui.transformer),
    }
    for name, change in changed.items():
        change()
        now = model_key(open_model(comfyui), FileMemory(tmp_path))
        assert {each for each in now if now[each] != before[each]} == {name}
        before = now
    assert comfyui.tokenizer_2 is not None
    change_json(comfyui.tokenizer_2 / "tokenizer_config.json", another="setting")
    assert model_key(open_model(comfyui), FileMemory(tmp_path))["text_encoders"] != before["text_encoders"]


def test_no_file_of_a_model_is_hashed_twice(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = files.sha256_file

    def told(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(files, "sha256_file", told)
    memory = FileMemory(tmp_path)
    found = model_key(open_model(tiny_model_dir), memory)
    assert read
    assert len(set(read)) == len(read)
    memory.save()
    read.clear()
    assert model_key(open_model(tiny_model_dir), FileMemory(tmp_path)) == found
    assert read == []


def test_an_adapter_is_known_by_its_weight_and_by_scales_in_a_file_beside_it(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{LAYER}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(tensors, tmp_path / FILES[0])
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    first = load_adapter(tmp_path)
    change_json(tmp_path / CONFIG, lora_alpha=16)
    second = load_adapter(tmp_path)
    assert first.sha256 == second.sha256
    known = [adapters_key(each) for each in ([(first, 1.0)], [(second, 1.0)], [(first, 0.5)], [])]
    assert all(one != other for index, one in enumerate(known) for other in known[:index])
