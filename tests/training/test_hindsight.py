"""What averaging takes in memory: rows of its sources, whatever their count and the adapter's kind."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libreflux.training import checkpoint, hindsight

LAYERS, SOURCES = 8, 12


class Census(TorchDispatchMode):
    """The most bytes of tensors that are alive at any time, those that an operation gave or took."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, found)):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.alive[id(tensor)] = weakref.ref(tensor), tensor.nbytes
        self.alive = {key: one for key, one in self.alive.items() if one[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return found


def shapes(kind: str) -> dict[str, tuple[int, int]]:
    """Of a layer of 512 x 512, whose factors have far fewer numbers."""
    if kind == "lokr":
        return {"lokr_w1": (4, 4), "lokr_w2": (128, 128)}
    return {"lora_down.weight": (4, 512), "lora_up.weight": (512, 4)}


@pytest.mark.parametrize("kind", ["lokr", "lora"])
def test_an_average_of_many_takes_less_than_two_adapters(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    names = [(f"lycoris_layer{layer}.{name}", shape) for layer in range(LAYERS) for name, shape in shapes(kind).items()]
    for step in range(1, SOURCES + 1):
        made = {name: torch.randn(shape, generator=random) for name, shape in names}
        made |= {f"lycoris_layer{layer}.alpha": torch.tensor(4.0) for layer in range(LAYERS)}
        checkpoint.write(tmp_path, step, {checkpoint.ADAPTER: partial(save_file, made)}, {})
    monkeypatch.setattr(hindsight, "CHUNK", 2048)
    adapter = sum(4 * shape[0] * shape[1] for _, shape in names)
    with Census() as census:
        averaged = hindsight.lerp(tmp_path, 0.3)
    assert adapter < census.most < 2 * adapter
    assert len(averaged.tensors) == LAYERS * 3
