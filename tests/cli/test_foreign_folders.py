"""Model folders as other programs and systems leave them: read, or refused by the name of their format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from libreflux.model.opening import open_model
from libreflux.model.source import weights_hash
from opened import opened


def one_line(outcome: tuple[int, str, str], *parts: str) -> None:
    code, out, err = outcome
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("libreflux: error: ")
    assert "; hint: " in err
    assert "\x1b" not in err
    for part in parts:
        assert part in err


def changed(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def renamed(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def mac_files(folder: Path) -> None:
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.json")]:
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (folder / "transformer" / "._x.bin").write_bytes(b"\x00\x05\x16\x07")


FORMATS: dict[str, tuple[str, Any, str]] = {
    "bitsandbytes": (
        "transformer",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "quantised by bitsandbytes (nf4)",
    ),
    "bitsandbytes, 8 bit": (
        "text_encoder_2",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "by bitsandbytes (8 bit)",
    ),
    "torchao": ("transformer", {"quant_method": "torchao", "quant_type": "int8wo"}, "by torchao (int8wo)"),
    "torchao of T5": ("text_encoder_2", {"quant_method": "torchao", "quant_type": {"default": {}}}, "by torchao"),
    "gptq": ("text_encoder_2", {"quant_method": "gptq", "bits": 4}, "quantised by gptq,"),
    "a text": ("transformer", "nf4", "quantization_config cannot be 'nf4'"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_a_quantised_model_is_named_by_its_format(
    libreflux: Callable, tiny_model_dir: Path, tmp_path: Path, case: str
) -> None:
    part, values, told = FORMATS[case]
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    changed(model, f"{part}/config.json", quantization_config=values)
    one_line(libreflux(tmp_path, "generate", "x", "--model", model, "--out", "y.png"), part, told)
    if case == "torchao":  # most of them are pickles
        renamed(model / part, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        one_line(libreflux(tmp_path, "generate", "x", "--model", model, "--out", "y.png"), part, told)


def test_what_macos_leaves_on_other_disks_is_passed_over(
    libreflux: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    mac_files(model)
    assert weights_hash(model) == weights_hash(tiny_model_dir)
    for name, where in (("a", tiny_model_dir), ("b", model)):
        code, _, err = libreflux(tmp_path, "generate", "x", "--model", where, "--steps", 1, "--out", f"{name}.png")
        assert code == 0, err
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    code, _, err = libreflux(tmp_path, "export", model, "--int8", "--out", "int8")
    assert code == 0, err
    assert not [*(tmp_path / "int8").rglob("._*")], err


@pytest.mark.parametrize("sharded", [False, True])
def test_a_lone_variant_is_read_and_said(
    libreflux: Callable, tiny_model_dir: Path, tmp_path: Path, sharded: bool
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    whole = opened(tiny_model_dir)
    parts = {"transformer": whole.transformer, "text_encoder_2": whole.text.text_encoder_2}
    for part, live in parts.items():
        shutil.rmtree(model / part)
        live.half().save_pretrained(model / part, variant="fp16", max_shard_size="60KB" if sharded else "1GB")
    found = opened(model)
    for part, read in (("transformer", found.transformer), ("text_encoder_2", found.text.text_encoder_2)):
        kept = read.state_dict()
        assert all(torch.equal(tensor, kept[name].half()) for name, tensor in parts[part].state_dict().items())
    assert found.transformer.dtype == torch.float16
    code, _, err = libreflux(tmp_path, "generate", "x", "--model", model, "--steps", 1, "--out", "y.png")
    assert code == 0, err
    assert err.count("as the variant fp16 alone: that is read") == 2, err
    code, _, err = libreflux(tmp_path, "export", model, "--int8", "--out", "int8")
    assert code == 0, err
    open_model(tmp_path / "int8").load_text()  # under plain names, which every program reads
    assert not [*(tmp_path / "int8" / "text_encoder_2").glob("model.fp16.*")]


def test_a_variant_beside_the_plain_weights_has_no_say(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    halves = {name: torch.zeros_like(tensor, dtype=torch.float16) for name, tensor in load_file(file).items()}
    save_file(halves, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    read, plain = (open_model(where).load_transformer() for where in (model, tiny_model_dir))
    assert read.dtype == torch.float32
    assert torch.equal(read.proj_out.weight, plain.proj_out.weight)
