"""Encoders whose weights come block by block: the numbers of whole ones, one block at a time, stored bytes at rest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from libreflux.model import text as text_module
from libreflux.model.opening import open_model
from libreflux.model.single_file import find_comfyui
from libreflux.model.text import TextEncoders
from opened import opened

PROMPTS = [
    "a red apple on blue",
    "",
    "a fox left of a rocket, on yellow",
    "zyx & Co.",
    "a fox",
    "a small green frog " * 9,
]
FP32 = torch.float32


def stored_as(model: Path, out: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """The model with the tensors of its text encoders in other dtypes; "" is that of all others."""
    shutil.copytree(model, out)
    for part in ("text_encoder", "text_encoder_2"):
        [file] = (out / part).glob("*.safetensors")
        tensors = {name: tensor.to(dtypes.get(name, dtypes[""])) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return out


def encoders(model: Path, **options: Any) -> TextEncoders:
    return open_model(model).load_text(**options)


@pytest.fixture(scope="module")
def half_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, as T5-XXL is published, but for one tensor that bf16 cannot hold."""
    kept = {"encoder.block.1.layer.1.DenseReluDense.wo.weight": FP32, "": torch.bfloat16}
    return stored_as(tiny_model_dir, tmp_path_factory.mktemp("half") / "m", kept)


@pytest.fixture(scope="module", params=["folder", "files"])
def half(request: pytest.FixtureRequest, half_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    if request.param == "folder":
        return half_dir
    out = tmp_path_factory.mktemp("files") / "comfy"
    opened(half_dir).save_files(out)
    return find_comfyui(out)


@pytest.mark.parametrize("padding", ["drop", "trim", "keep"])
def test_a_prompt_has_the_bits_of_the_whole_encoders(half: Path, padding: str) -> None:
    whole, blocks = encoders(half, dtype=FP32), encoders(half, dtype=FP32, by_block=True)
    for prompt in PROMPTS:
        one, other = (each.encode([prompt], padding=padding, max_tokens=64) for each in (whole, blocks))
        assert torch.equal(one.tokens[0], other.tokens[0])
        assert torch.equal(one.pooled, other.pooled)
        assert one.tokens[0].dtype == FP32 == one.pooled.dtype


def test_many_prompts_share_a_sweep_over_the_weights(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, blocks = encoders(tiny_model_dir), encoders(tiny_model_dir, by_block=True)
    sweeps: dict[int, list[int]] = {id(text): [] for text in (whole, blocks)}
    for text in (whole, blocks):
        seen = sweeps[id(text)]
        text.text_encoder_2.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
    one, other = (text.encode(PROMPTS, padding="drop", max_tokens=64) for text in (whole, blocks))
    assert len(sweeps[id(whole)]) == len(set(one.lengths)) > 3
    assert len(sweeps[id(blocks)]) == 1
    assert one.lengths == other.lengths
    for mine, yours in zip(one.tokens, other.tokens, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.pooled, other.pooled)
    monkeypatch.setattr(text_module, "TOKENS_PER_PASS", 20)
    cut = blocks.encode(PROMPTS, padding="drop", max_tokens=64)
    assert len(sweeps[id(blocks)]) > 2
    for mine, yours in zip(one.tokens, cut.tokens, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-5)


def there(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, one) for name, one in root.named_parameters(remove_duplicate=False) if one.device.type != "meta")


def test_one_block_is_on_the_device_at_a_time_and_in_fp32(half: Path) -> None:
    text = encoders(half, dtype=FP32, by_block=True)
    for encoder in (text.text_encoder_2, text.text_encoder):
        present: list[set[str]] = []

        def look(module: nn.Module, *_: object, of: nn.Module = encoder, present: list[set[str]] = present) -> None:
            found = dict(there(of))
            assert all(one.dtype == FP32 for one in found.values())
            present.append({name.rpartition("layers" if "layers" in name else "block")[2][:2] for name in found})
            assert len(found) == len(list(module.parameters()))

        blocks = [m for m in encoder.modules() if type(m).__name__ in ("T5Block", "CLIPEncoderLayer")]
        for block in blocks:
            # accelerate wraps `forward`: within it, the weights are there
            within = next(m for m in block.modules() if type(m) is nn.Linear)
            within.register_forward_pre_hook(lambda *_, block=block, look=look: look(block))
        text.encode(PROMPTS[:1], padding="drop", max_tokens=64)
        assert present == [{".0"}, {".1"}]
        assert not dict(there(encoder))


def test_what_rests_is_as_stored(half_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    def resting(model: Path) -> set[torch.dtype]:
        text = encoders(model, dtype=FP32, by_block=True)
        hooks = [m._hf_hook for m in text.text_encoder_2.modules() if hasattr(m, "_hf_hook")]
        maps = [h.weights_map.dataset for h in hooks if getattr(h, "weights_map", None) is not None]
        return {tensor.dtype for tensor in maps[0].resting.values()}

    uniform = stored_as(tiny_model_dir, tmp_path / "m", {"": torch.bfloat16})
    assert resting(uniform) == {torch.bfloat16}
    assert resting(half_dir) == {FP32}  # transformers has one dtype for all: the one that loses nothing
