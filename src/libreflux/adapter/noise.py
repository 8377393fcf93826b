"""Noise in an adapter's place: the same layers and sizes, the same norm of every layer's change, and no training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libreflux import seeding
from libreflux.adapter.io import AdapterFile
from libreflux.adapter.layers import LORA_SUFFIXES, delta_from_tensors, delta_norm
from libreflux.errors import AdapterError

FORMULA = 1
"""Raised when the same file and seed come to give other noise."""
KEPT = ("schema", "key_map", "text_padding", "max_tokens")
"""Of the file's metadata: what it takes to put its layers on a model, and to read prompts as it does."""


def noise_like(file: AdapterFile, seed: int = 0) -> AdapterFile:
    """An adapter of normal noise whose change of each layer has the Frobenius norm of the file's.

    Args:
        file: gives layers, sizes and norms.
        seed: of the noise, which depends on it and on the layer's name alone.

    Raises:
        AdapterError: tensors that are no LoKr's or LoRA's.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        prefix, _, suffix = key.partition(".")
        layers.setdefault(prefix, {})[suffix] = tensor
    tensors: dict[str, Tensor] = {}
    for prefix, found in layers.items():
        where = f"{file.where}, {prefix}"
        delta = delta_from_tensors(found, *_features(found, where), where, dtype=torch.float32)
        norm, parts = delta_norm(delta), list(delta.parameters())
        random = seeding.generator(seed, "noise-adapter", prefix)
        with torch.no_grad():
            for part in parts:
                part.copy_(torch.randn(part.shape, generator=random))
            parts[-1].mul_(norm / delta_norm(delta))
        tensors |= {f"{prefix}.{suffix}": tensor.clone() for suffix, tensor in delta.tensors().items()}
    kept = {name: value for name, value in file.metadata.items() if name in KEPT}
    return AdapterFile("noise of the same norm", tensors, kept, f"noise {FORMULA} {seed} of {file.sha256}")


def _features(tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """(in_features, out_features) of the layer that these tensors fit."""
    try:
        if all(suffix in tensors for suffix in LORA_SUFFIXES):
            return tensors["lora_down.weight"].shape[1], tensors["lora_up.weight"].shape[0]
        rows = columns = 1
        for side in ("lokr_w1", "lokr_w2"):
            rows *= tensors[side if side in tensors else f"{side}_a"].shape[0]
            columns *= tensors[side if side in tensors else f"{side}_b"].shape[1]
        return columns, rows
    except (KeyError, IndexError):
        hint = "use plain LoKr or LoRA files"
        raise AdapterError(f"neither LoKr nor LoRA: {sorted(tensors)}", where=where, hint=hint) from None
