"""Streamed safetensors against the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from libreflux.model.stream import stream_safetensors


def test_streamed_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7), "c": torch.randn(4, 2).t(), "d": torch.zeros(0, 3),
        "e": torch.tensor(2.5), "f": torch.tensor([True, False]), "g": torch.tensor([[-1, 2]], dtype=torch.int8),
    }  # fmt: skip
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "new" / "x.safetensors"
    stream_safetensors(path, layout, iter(tensors.items()), {"z": "ä", "a": "1"})
    read = load_file(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], one) for name, one in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"z": "ä", "a": "1"}
    before = path.read_bytes()
    wrong = {**tensors, "c": torch.zeros(2, 5)}
    for given in (wrong, dict(list(tensors.items())[:3])):
        with pytest.raises(ValueError):
            stream_safetensors(path, layout, iter(given.items()))
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["x.safetensors"]
