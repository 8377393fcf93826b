"""Features of a local vision model in the judge's place: distances and diversity of real pictures, no accuracy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from libreflux.errors import ModelError
from libreflux.files import sha256_file
from libreflux.model.load import quiet
from libreflux.model.parts import check_part, json_object, visible
from libreflux.places import did_you_mean
from libreflux.probing.judges import Judge, Verdict

MOST_SIDE = 4096
"""Pixels per side that a vision model may ask for."""


class Features(Judge):
    """CLIP, DINO or another vision model of transformers as a judge that knows no names.

    Args:
        model: gives `get_image_features`, a pooled output, or hidden states whose first token stands for the picture.
        mean, std: [3], of its inputs.
        side: of its inputs, pixels.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], side: int) -> None:
        nn.Module.__init__(self)
        self.subjects, self.colours, self.side = (), (), side
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> Verdict:
        """Looks at pixels [B, 3, side, side] in [-1, 1]; the verdict has features [B, D] alone."""
        inputs = (pixels / 2 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=inputs)  # type: ignore[operator]
        else:
            found = self.model(pixel_values=inputs)
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state[:, 0] if pooled is None else pooled
        none = pixels.new_zeros(len(pixels), 0)
        return Verdict(none, none, found.flatten(1).float())


def load_features(folder: Path) -> Features:
    """A vision model from a local transformers folder: safetensors, config.json, preprocessor_config.json.

    Raises:
        ModelError: no such folder, or not such a model.
    """
    if not folder.is_dir():
        raise ModelError(
            "no such folder", where=folder, hint=did_you_mean(folder, "name a local folder of CLIP, DINO or the like")
        )
    check_part(folder)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file() and "auto_map" in json_object(folder / name):
            what = "names Python code of its own (auto_map), which is not run"
            raise ModelError(what, where=folder / name, hint="use a model that transformers has itself")
    # Not `from transformers import AutoImageProcessor`: that name asks for torchvision, in 5.12 still.
    ours: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(folder, **ours)
            model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **ours)
        size = getattr(processor, "crop_size", None) or processor.size
        side = size["height"] if "height" in size else size["shortest_edge"]
        if not 1 <= int(side) <= MOST_SIDE:
            raise ValueError(f"inputs of {side} pixels")
        made = Features(model, list(processor.image_mean), list(processor.image_std), int(side))
    except Exception as error:  # transformers' own, safetensors', the disk's: no common ancestor
        hint = "name a folder with config.json, preprocessor_config.json and safetensors"
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"no vision model ({told[0][:200]})", where=folder, hint=hint) from error
    return made.eval().requires_grad_(False)


def features_digest(folder: Path) -> str:
    """SHA-256 over the folder's JSON and safetensors files: which features they are."""
    total = hashlib.sha256()
    for file in sorted([*visible(folder, "*.json"), *visible(folder, "*.safetensors")]):
        total.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return total.hexdigest()
