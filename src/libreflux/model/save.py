"""Writes a model as a folder that libreflux and diffusers load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from libreflux.errors import ModelError
from libreflux.files import atomic_write_json, staged_dir
from libreflux.model.facts import Facts, write_facts
from libreflux.model.finite import check_weights
from libreflux.model.int8 import int8_layers
from libreflux.model.int8_files import write_all_checksums, write_int8
from libreflux.model.load import quiet
from libreflux.model.locate import PARTS, part_folder
from libreflux.model.parts import copy_part, json_object
from libreflux.model.source import TEXT_PARTS, ModelSource
from libreflux.model.streamed import StreamedTransformer
from libreflux.model.text import TextEncoders

_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LiveParts:
    """Parts that `save_model` writes, in memory or made meanwhile; what is None is copied from a source."""

    transformer: FluxTransformer2DModel | StreamedTransformer | None = None
    vae: AutoencoderKL | None = None
    text: TextEncoders | None = None
    scheduler: FlowMatchEulerDiscreteScheduler | None = None

    def by_name(self) -> dict[str, Any]:
        """PARTS that are in memory."""
        live: dict[str, Any] = {"transformer": self.transformer, "vae": self.vae, "scheduler": self.scheduler}
        live |= {part: getattr(self.text, part, None) for part in TEXT_PARTS}
        return {name: part for name, part in live.items() if part is not None}


def save_model(
    out: Path, facts: Facts, live: LiveParts, source: ModelSource | None = None, extras: Mapping[str, str] | None = None
) -> Path:
    """Write a model as a folder that `open_model` and, unless it is int8, diffusers' `FluxPipeline` load.

    The folder appears complete or not at all.

    Args:
        out: the folder.
        facts: the new model's.
        live: parts in memory.
        source: a model in folders, from which the other parts are copied.
        extras: further files, name -> text.

    Raises:
        ModelError: a part is neither in memory nor on disk.
        NotFiniteError: a weight in memory is not finite.
        RunError: `out` exists.
    """
    name = "the new model" if source is None else source.name
    parts = live.by_name()
    parts.setdefault("scheduler", FlowMatchEulerDiscreteScheduler() if source is None else source.scheduler)
    with staged_dir(Path(out)) as staging, quiet():
        for part, module in parts.items():  # again: it was merged, or trained
            if isinstance(module, torch.nn.Module):
                check_weights(module.state_dict(), f"{name}, {part}")
        for part in PARTS:
            if isinstance(streamed := parts.get(part), StreamedTransformer):
                streamed.write(staging / part)
            elif part == "transformer" and part in parts and int8_layers(parts[part]):
                write_int8(staging / part, json.loads(parts[part].to_json_string()), parts[part].state_dict().items())
            elif part in parts:
                parts[part].save_pretrained(staging / part)
                _forget_its_place(staging / part / "config.json")
            elif source is not None and (stored := part_folder(source.fetch(part), part)).is_dir():
                copy_part(stored, staging / part)
                _forget_its_place(staging / part / "config.json")
            else:
                raise ModelError(f"has no {part} to save", where=name, hint="pass all its parts")
        index = {**_INDEX, "_diffusers_version": diffusers.__version__}
        atomic_write_json(staging / "model_index.json", index)
        write_facts(staging, dataclasses.replace(facts, parts_from=None))
        for file, content in (extras or {}).items():
            (staging / file).write_text(content, encoding="utf-8")
        if _is_int8(live.transformer):
            write_all_checksums(staging)
    return Path(out)


def _forget_its_place(config: Path) -> None:
    """diffusers writes where on this machine a part was read from."""
    if config.is_file():
        told = json_object(config)
        if told.pop("_name_or_path", None) is not None:
            atomic_write_json(config, told)


def _is_int8(transformer: FluxTransformer2DModel | StreamedTransformer | None) -> bool:
    if isinstance(transformer, StreamedTransformer):
        return transformer.int8
    return transformer is not None and bool(int8_layers(transformer))
