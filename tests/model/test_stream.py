"""Streamed safetensors against the library."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from libreflux.errors import RunError
from libreflux.files import atomic_save_safetensors
from libreflux.model.stream import save_live, stream_safetensors
from libreflux.training.live_bytes import LiveBytes


def test_streamed_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "c": torch.randn(4, 2).t(),
        "d": torch.zeros(0, 3),
        "e": torch.tensor(2.5),
        "f": torch.tensor([True, False]),
        "g": torch.tensor([[-1, 2]], dtype=torch.int8),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "new" / "x.safetensors"
    stream_safetensors(path, layout, iter(tensors.items()), {"z": "ä", "a": "1"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], one) for name, one in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"z": "ä", "a": "1"}
    before = path.read_bytes()
    wrong = {**tensors, "c": torch.zeros(2, 5)}
    for given in (wrong, dict(list(tensors.items())[:3])):
        with pytest.raises(ValueError):
            stream_safetensors(path, layout, iter(given.items()))
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["x.safetensors"]


def test_live_tensors_give_the_bytes_of_a_whole_save(tmp_path: Path) -> None:
    flat = torch.randn(12)
    kinds = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float64,
        torch.int64,
    )
    tensors = {f"{number % 3}{kind}": torch.arange(number + 1).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"b": flat[:6].view(2, 3), "a": flat[6:], "ü": torch.randn(4, 2).t(), "none": torch.zeros(0, 3)}
    tensors |= {"step": torch.tensor(7), "w": torch.randn(3, requires_grad=True)}
    for number, metadata in enumerate((None, {"z": "ä", "a": '"1"\n'})):
        save_live(tmp_path / f"live{number}", tensors, metadata)
        atomic_save_safetensors({name: one.detach().clone() for name, one in tensors.items()}, tmp_path / "x", metadata)
        assert (tmp_path / f"live{number}").read_bytes() == (tmp_path / "x").read_bytes()
        assert (tmp_path / f"live{number}").stat().st_mode == (tmp_path / "x").stat().st_mode
    save_live(tmp_path / "empty", {})
    assert load_file(tmp_path / "empty") == {}


def test_of_live_tensors_one_is_copied_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(number): torch.randn(1 << 16) for number in range(20)}
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as if each came from a card
    with LiveBytes() as counted:
        save_live(tmp_path / "x", tensors)
    assert counted.peak == 4 << 16
    with LiveBytes() as counted:
        atomic_save_safetensors(tensors, tmp_path / "y")
    assert counted.peak == 20 * (4 << 16)


def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(RunError, match=r"/x: File too large; hint: make room"):
            save_live(tmp_path / "x", {"w": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []
