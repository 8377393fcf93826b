"""Noise in an adapter's place: the norm of every layer's change is the adapter's, to the last digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from libreflux.adapter.io import AdapterFile, attach_file
from libreflux.adapter.layers import delta_norm
from libreflux.adapter.noise import noise_like
from libreflux.errors import AdapterError


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_each_layer_keeps_its_norm_and_nothing_else() -> None:
    tensors = {
        "lycoris_full.lokr_w1": drawn(2, 3),
        "lycoris_full.lokr_w2": drawn(4, 4),
        "lycoris_low.lokr_w1": drawn(2, 3),
        "lycoris_low.lokr_w2_a": drawn(4, 2),
        "lycoris_low.lokr_w2_b": drawn(2, 4),
        "lycoris_low.alpha": torch.tensor(1.0),
        "lycoris_lora.lora_down.weight": drawn(3, 12),
        "lycoris_lora.lora_up.weight": drawn(8, 3),
        "lycoris_none.lora_down.weight": drawn(3, 12),
        "lycoris_none.lora_up.weight": torch.zeros(8, 3),
    }
    file = AdapterFile("mine", tensors, {"step": "3", "text_padding": "drop"}, "sha")
    made = noise_like(file, 1)
    models = [nn.ModuleDict({name: nn.Linear(12, 8) for name in ("full", "low", "lora", "none")}) for _ in range(2)]
    norms = [
        {name: delta_norm(layer.delta) for name, layer in attach_file(model, each).layers.items()}
        for model, each in zip(models, (file, made), strict=True)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[1]["none"] == 0
    assert made.metadata == {"text_padding": "drop"}
    assert all(torch.equal(made.tensors[name], again) for name, again in noise_like(file, 1).tensors.items())
    assert not torch.equal(made.tensors["lycoris_full.lokr_w2"], noise_like(file, 2).tensors["lycoris_full.lokr_w2"])


def test_other_tensors_are_refused() -> None:
    with pytest.raises(AdapterError, match="neither LoKr nor LoRA"):
        noise_like(AdapterFile("mine", {"lycoris_x.lora_up.weight": drawn(2, 2)}, {}))
