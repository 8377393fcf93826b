"""What of a model decides the pictures that are drawn with it, as plain values: part of the key of whatever is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libreflux.adapter.io import AdapterFile
from libreflux.data.digests import TEXT_PARTS, VAE_PARTS, FileMemory, parts_digest
from libreflux.decided import digest
from libreflux.model.facts import Facts
from libreflux.model.locate import locate, part_folder
from libreflux.model.opening import open_model
from libreflux.model.parts import json_object
from libreflux.model.single_file import SingleFiles
from libreflux.model.source import weights_hash
from libreflux.model.tensor_file import TensorFile

FORMULA = 1
"""Raised when the same model and the same request come to give another picture, not only other last bits."""


def model_key(source: str | SingleFiles, memory: FileMemory) -> dict[str, str]:
    """The weights and configuration of the transformer, the VAE, and the text encoders with their tokenizers.

    Args:
        source: a name, see `locate`, or single files.
        memory: knows the files that were read before; of a model that has not changed none is read again.
    """
    if isinstance(source, SingleFiles):
        return _single_key(source, memory)
    folder = locate(source)
    return {
        "transformer": weights_hash(folder, memory.sha256),
        "transformer_config": config_digest(folder / "transformer" / "config.json"),
        "vae": parts_digest({part: part_folder(folder, part) for part in VAE_PARTS}, memory),
        "text_encoders": parts_digest({part: part_folder(folder, part) for part in TEXT_PARTS}, memory),
    }


def _single_key(source: SingleFiles, memory: FileMemory) -> dict[str, str]:
    opened = open_model(source)

    def told(parts: tuple[str, ...]) -> str:
        found = opened.places(*parts)
        return parts_digest(
            {part: place.path if isinstance(place, TensorFile) else place for part, place in found.items()}, memory
        )

    base = None if source.base is None else locate(source.base, weights=False) / "transformer" / "config.json"
    return {
        "transformer": weights_hash(source.transformer, memory.sha256),
        "transformer_config": "" if base is None else config_digest(base),  # the file itself tells the rest
        "vae": told(VAE_PARTS),
        "text_encoders": told(TEXT_PARTS),
    }


def config_digest(path: Path) -> str:
    """Of a config.json without the names that begin with "_": which version wrote it, and from where it came."""
    return digest({name: value for name, value in json_object(path).items() if not name.startswith("_")})


def facts_key(facts: Facts) -> dict[str, Any]:
    """The facts that decide a picture besides its steps and its scale of classifier-free guidance."""
    embedded = facts.embedded_guidance
    return {
        "text_padding": facts.text_padding,
        "max_tokens": facts.max_tokens,
        "shift": None if facts.shift is None else float(facts.shift),
        "embedded_guidance": None if embedded is None else float(embedded),
    }


def adapters_key(adapters: Sequence[tuple[AdapterFile, float]]) -> list[list[Any]]:
    """SHA-256, weight and scales of each adapter: PEFT keeps the scales in a file of their own."""
    return [[file.sha256, weight, digest(_scales(file))] for file, weight in adapters]


def _scales(file: AdapterFile) -> dict[str, float]:
    return {name: float(tensor) for name, tensor in file.tensors.items() if name.endswith(".alpha")}
