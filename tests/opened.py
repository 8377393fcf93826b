"""A model with all its parts in memory, for tests that change or compare them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from libreflux.model.facts import Facts
from libreflux.model.opening import open_model
from libreflux.model.save import LiveParts, save_model
from libreflux.model.single_file import SingleFiles
from libreflux.model.single_save import save_files
from libreflux.model.text import TextEncoders
from libreflux.sample.pipeline import LibreFluxOutput, LibreFluxPipeline


@dataclass
class Opened:
    """See `libreflux.model.source.ModelSource` for the names."""

    name: str
    facts: Facts
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text: TextEncoders
    scheduler: FlowMatchEulerDiscreteScheduler

    def save(self, out: Path) -> Path:
        """As a diffusers folder."""
        live = LiveParts(transformer=self.transformer, vae=self.vae, text=self.text, scheduler=self.scheduler)
        return save_model(out, self.facts, live)

    def save_files(self, out: Path) -> list[str]:
        """As single files."""
        return save_files(out, self.name, self.facts, self.transformer, self.vae, self.text)

    def pipeline(self) -> LibreFluxPipeline:
        """Over these parts."""
        return LibreFluxPipeline.from_parts(self.transformer, self.vae, self.text, self.facts, self.scheduler)


def opened(
    name: str | Path | SingleFiles,
    *,
    dtype: torch.dtype | str | None = None,
    quantise: bool | None = None,
    device: torch.device | str = "cpu",
) -> Opened:
    """Every part of a model, loaded."""
    source = open_model(name)
    return Opened(
        source.name,
        source.facts,
        source.load_transformer(dtype=dtype, quantise=quantise, device=device),
        source.load_vae(dtype=dtype, device=device),
        source.load_text(dtype=dtype, device=device),
        source.scheduler,
    )


def tensor_of(drawn: LibreFluxOutput) -> Tensor:
    """What was drawn as "pt" or "latent"."""
    assert isinstance(drawn.images, Tensor)
    return drawn.images


def pictures_of(drawn: LibreFluxOutput) -> list[Image.Image]:
    """What was drawn as "pil"."""
    assert isinstance(drawn.images, list)
    return drawn.images
