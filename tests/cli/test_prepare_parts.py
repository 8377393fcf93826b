from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from libreflux.data.cache import Cache
from libreflux.errors import RecipeError
from libreflux.workflows.prepare import parse_part


def test_parts_are_counted_from_one_or_taken_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parse_part(None) == (0, 1)
    assert [parse_part(text) for text in ("1/1", "1/3", "3/3")] == [(0, 1), (0, 3), (2, 3)]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_part(None) == (2, 4)
    assert parse_part("1/3") == (0, 3)


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/3/5"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no part; hint: write 1/4 to 4/4"):
        parse_part(text)


def test_the_text_encoders_compute_in_what_is_asked_for(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    command = ["prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--device", "cpu", "--out", out]
    assert run(*command, "--text-precision", "bf16").code == 0
    assert Cache(out).settings["text_precision"] == "bfloat16"
    assert run(*command).code == 0
    other = run(*command, "--text-precision", "fp32")
    assert other.code != 0
    assert "text_precision bfloat16, now float32; hint: use another cache" in other.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model_dir}\nresolution: [32]\nsteps: 1\ndata: [{{path: {pictures}}}]\n")
    told = run("prepare", recipe, "--out", tmp_path / "other", "--text-precision", "bf16")
    assert told.code != 0
    assert "--text-precision: the recipe says this" in told.err


@pytest.mark.parametrize("where", [AutoencoderKL, T5EncoderModel])
def test_a_device_without_memory_is_one_line(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.00 GiB.\nlong advice")

    monkeypatch.setattr(where, "encode" if where is AutoencoderKL else "forward", too_much)
    done = run("prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--out", tmp_path / "cache")
    [line] = [line for line in done.err.splitlines() if "out of memory" in line]
    assert done.code != 0
    assert "encoding" in line
    assert "hint:" in line
    assert "Traceback" not in done.err
    assert "long advice" not in done.err


def test_prepare_reads_all_that_is_there_and_makes_damaged_shards_anew(
    run: Callable, tiny_model_dir: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "cache"
    command = ["prepare", pictures, "--model", tiny_model_dir, "--resolution", 32, "--device", "cpu", "--out", out]
    assert run(*command).code == 0
    [shard] = (out / "shards").glob("latents-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(*command).code == 0
    assert f"{shard} was damaged: what it held is made anew" in [record.getMessage() for record in caplog.records]
    assert shard.read_bytes() == whole
    (out / "index.sqlite3").write_bytes((out / "index.sqlite3").read_bytes()[:5000])
    refused = run(*command)
    assert refused.code == 2
    assert "damaged index" in refused.err
    assert "Traceback" not in refused.err
