"""What averaging takes in memory: rows of its sources, whatever their count and the adapter's kind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from census import Census
from libreflux.training import checkpoint, hindsight

LAYERS, SOURCES = 8, 12


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
