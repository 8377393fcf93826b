"""What `generate`, its `--remake` and `demo` share: a model, perhaps with adapters, opened for drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from libreflux.adapter.files import attach_file
from libreflux.cli.adapters import adapted_facts, load_arguments, notice_other_base
from libreflux.errors import ModelError
from libreflux.flow.solve import Step
from libreflux.model.device import pick_device
from libreflux.model.facts import Facts
from libreflux.model.family import open_model, weights_hash
from libreflux.model.text import check_padding
from libreflux.sample.metadata import Origin, versions
from libreflux.sample.pipeline import LibreFluxPipeline


@dataclass(frozen=True)
class Opened:
    """A pipeline and what a picture's record says of it.

    Attributes:
        pipe: ready to draw.
        facts: the model's, under its adapters.
        dtype: of the transformer's weights.
        hashes: "transformer" to its SHA-256.
        adapters: file name, SHA-256 and weight of each adapter, in order.
    """

    pipe: LibreFluxPipeline
    facts: Facts
    dtype: str
    hashes: dict[str, str]
    adapters: list[dict[str, Any]] = field(default_factory=list)

    def stamped(self, origin: Origin) -> Origin:
        """The same picture, made with this model on this machine."""
        return dataclasses.replace(
            origin, dtype=self.dtype, device=_device_name(self.pipe.device), hashes=self.hashes,
            adapters=self.adapters, versions=versions(),
        )  # fmt: skip

    def draw(self, origin: Origin, on_step: Callable[[Step], None] | None = None) -> Image.Image:
        """The picture that an origin tells of; alone, since its last bits depend on who shares its batch."""
        (image,) = self.pipe(
            origin.prompt,
            origin.negative,
            height=origin.height,
            width=origin.width,
            num_inference_steps=origin.steps,
            guidance_scale=origin.guidance,
            no_cfg_until=origin.no_cfg_until,
            guidance_start=origin.guidance_start,
            guidance_stop=origin.guidance_stop,
            guidance_rescale=origin.guidance_rescale,
            batch_cfg=origin.batch_cfg,
            embedded_guidance=origin.embedded_guidance,
            tile=origin.tile,
            seeds=[origin.seed],
            callback_on_step=on_step,
        ).images
        assert isinstance(image, Image.Image)
        return image


def open_for_drawing(model: str, adapters: Iterable[str] = (), device: str = "auto") -> Opened:
    """Open a model with adapter arguments (`PATH[:WEIGHT]`); whatever can be refused is, before weights are loaded."""
    place, files = pick_device(device), load_arguments(adapters)
    facts = adapted_facts(open_model(model, parts=()).facts, files)
    check_padding(facts.text_padding)
    opened = open_model(model, device=place)
    if opened.transformer is None or opened.vae is None or opened.path is None:
        raise ModelError("has no transformer or no VAE", where=model, mend="use a complete model")
    opened.facts = facts
    dtype = str(opened.transformer.dtype).removeprefix("torch.")
    transformer_hash = weights_hash(opened.path)
    notice_other_base(transformer_hash, files)
    for file, weight in files:
        attach_file(opened.transformer, file, weight, dtype=opened.transformer.dtype)
    pipe = LibreFluxPipeline.from_model(opened)
    pipe.set_progress_bar_config(disable=True)
    rows = [{"file": Path(file.where).name, "sha256": file.sha256, "weight": weight} for file, weight in files]
    return Opened(pipe, facts, dtype, {"transformer": transformer_hash}, rows)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
