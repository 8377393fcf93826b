"""A second model that draws the first steps of a picture: what it must have, and what it draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers import AutoencoderKL

from libreflux.errors import ModelError, OptionError
from libreflux.model.source import ModelSource
from libreflux.sample.metadata import YOUNGER, GenerationRecord
from libreflux.workflows.picture_options import Offload, OffloadBlocks

_OF_LATENTS = ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels")


def first_record(record: GenerationRecord) -> GenerationRecord:
    """The picture as the model of the first steps is asked for it: with its own guidance, by the plain rule."""
    plain: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(record) if field.name in YOUNGER}
    return dataclasses.replace(record, guidance=record.first_steps_guidance or 0.0, **plain)


def check_beside_first(offload: Offload, offload_blocks: OffloadBlocks) -> None:
    """Raises OptionError for ways to save memory that know of one transformer alone."""
    if offload in ("model", "sequential") or offload_blocks != 0:
        name = "offload_blocks" if offload_blocks != 0 else "offload"
        what = "does not go with `first_steps_from`, which has two models in memory"
        raise OptionError(what, name, hint="use `quantize` int8")


def check_latents_agree(source: ModelSource, vae: AutoencoderKL, other: ModelSource, others: AutoencoderKL) -> None:
    """Raises ModelError for two models that do not draw in the same latents."""
    differ = [name for name in _OF_LATENTS if vae.config[name] != others.config[name]]
    if source.config["in_channels"] != other.config["in_channels"]:
        differ.append("in_channels")
    if differ:
        what = f"draws in other latents than the model ({', '.join(differ)})"
        raise ModelError(what, where=other.name, hint="use the base that the model was distilled from")
