"""A damaged or wrong adapter: `generate` says what, where and the hint on one line, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.refusing import refused, replaced


def lora_for_wider_layers(file: Path) -> None:
    prefix = "lycoris_transformer_blocks_0_attn_to_q"
    save_file(
        {
            f"{prefix}.lora_down.weight": torch.zeros(2, 64),
            f"{prefix}.lora_up.weight": torch.zeros(64, 2),
            f"{prefix}.alpha": torch.tensor(2.0),
        },
        file,
    )


def lora_for_other_layers(file: Path) -> None:
    save_file({"lycoris_layers_0_qkv.lora_down.weight": torch.zeros(2, 32)}, file)


def truncated_lora(file: Path) -> None:
    lora_for_wider_layers(file)
    replaced(file, file.read_bytes()[:-20])


ADAPTERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "of wider layers": (lora_for_wider_layers, ("to_q", "hint")),
    "of other layers": (lora_for_other_layers, ("tensors that fit no linear layer of this model",)),
    "truncated": (
        truncated_lora,
        ("not a whole",),
    ),
    "empty": (lambda file: file.write_bytes(b""), ("not a whole safetensors file",)),
    "a pickle": (lambda file: torch.save({}, file), ("not a whole safetensors file",)),
    "no adapter": (lambda file: save_file({"x": torch.zeros(1)}, file), (": x",)),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_wrong_adapter(libreflux: Callable, tiny_model_dir: Path, tmp_path: Path, case: str) -> None:
    damage, parts = ADAPTERS[case]
    damage(tmp_path / "a.safetensors")
    outcome = libreflux(tmp_path, "generate", "a fox", "--model", tiny_model_dir, "--adapter", "a.safetensors")
    refused(outcome, ("a.safetensors", *parts))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
