"""T5's `wo` stays in fp32 under fp16, on every way to an encoder: its residual stream is beyond fp16's range."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel

from libreflux.model.by_block import run_by_block
from libreflux.model.keep_fp32 import dtype_of
from libreflux.model.opening import open_model
from libreflux.model.single_file import SingleFiles
from libreflux.model.text import TextEncoders

PROMPTS = ["a red apple on blue", "a fox left of a rocket, on yellow"]
FP16, FP32 = torch.float16, torch.float32
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.fixture(scope="module")
def big(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its T5 in fp16 with a residual stream that reaches 1e6."""
    out = tmp_path_factory.mktemp("big") / "model"
    shutil.copytree(tiny_model_dir, out)
    file = out / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        tensors[name] = tensors[name] * (2000 if name == WO else 20 if ".wi_" in name else 1)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file, {"format": "pt"})
    config = out / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    return out


def of_folder(model: Path, **options: Any) -> TextEncoders:
    return open_model(model).load_text(**options)


def of_file(model: Path, **options: Any) -> TextEncoders:
    """The same with T5 from its single file, whose configuration is in the metadata."""
    file = model.parent / "t5xxl_fp16.safetensors"
    config = (model / "text_encoder_2" / "config.json").read_text()
    save_file(load_file(model / "text_encoder_2" / "model.safetensors"), file, {"text_encoder_2_config": config})
    files = SingleFiles(transformer=_bare(model), text_encoder_2=file, base=str(model))
    return open_model(files).load_text(**options)


def _bare(model: Path) -> Path:
    [file] = (model / "transformer").glob("*.safetensors")
    return file


def cast_whole(text: TextEncoders) -> TextEncoders:
    """As a pipeline's `.to(torch.float16)` does, which makes the encoders anew for each prompt."""
    torch.nn.Module.to(text.text_encoder_2, dtype=FP16)
    return TextEncoders(text.tokenizer, text.text_encoder, text.tokenizer_2, text.text_encoder_2)


def hooked(text: TextEncoders) -> TextEncoders:
    run_by_block(text.text_encoder_2, "cpu", FP16)
    text.by_block = True
    return text


WAYS: dict[str, Callable[[Path], TextEncoders]] = {
    "folder, as stored": of_folder,
    "folder, fp16 named": lambda model: of_folder(model, dtype=FP16),
    "folder, block by block": lambda model: of_folder(model, dtype=FP16, by_block=True),
    "folder, stored, block by block": lambda model: of_folder(model, by_block=True),
    "file, as stored": of_file,
    "file, fp16 named": lambda model: of_file(model, dtype=FP16),
    "file, block by block": lambda model: of_file(model, dtype=FP16, by_block=True),
    "file, stored, block by block": lambda model: of_file(model, by_block=True),
    "cast to fp16": lambda model: of_folder(model, dtype=FP32).to(dtype=FP16),
    "cast by others": lambda model: cast_whole(of_folder(model, dtype=FP32)),
    "hooked in fp16": lambda model: hooked(of_folder(model, dtype=FP32)),
}


@pytest.fixture(scope="module")
def exact(big: Path) -> list[Tensor]:
    text = of_folder(big, dtype=FP32)
    assert isinstance(text.text_encoder_2, T5EncoderModel)
    seen: list[float] = []
    text.text_encoder_2.encoder.block[1].register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0].abs().max()))
    )
    tokens = text.encode(PROMPTS, padding="drop", max_tokens=64).tokens
    assert max(seen) > 2e5  # what fp16 cannot hold: it ends at 65,504
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_text_of_a_large_residual(way: str, big: Path, exact: list[Tensor]) -> None:
    text = WAYS[way](big)
    assert any(one.dtype == FP16 for one in text.text_encoder_2.state_dict().values())
    for mine, yours in zip(text.encode(PROMPTS, padding="drop", max_tokens=64).tokens, exact, strict=True):
        assert float((mine.float() - yours).norm() / yours.norm()) < 0.005


def test_what_is_kept_is_what_the_libraries_name(tiny_model_dir: Path) -> None:
    t5 = of_folder(tiny_model_dir).text_encoder_2
    assert [dtype_of(t5, WO, dtype) for dtype in (FP16, torch.bfloat16, FP32)] == [FP32, torch.bfloat16, FP32]
    assert dtype_of(t5, WO.replace(".wo.", ".wi_0."), FP16) == FP16
    diffusers: Any = torch.nn.Linear(1, 1)
    diffusers._keep_in_fp32_modules = ["weight"]  # theirs count for bf16 too
    assert dtype_of(diffusers, "weight", torch.bfloat16) == FP32
    assert dtype_of(diffusers, "bias", FP16) == FP16
