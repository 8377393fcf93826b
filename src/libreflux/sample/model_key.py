"""What of a model decides the pictures that are drawn with it, as plain values: part of the key of whatever is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libreflux.adapter.io import AdapterFile
from libreflux.data.digests import TEXT_PARTS, VAE_PARTS, FileMemory, parts_digest
from libreflux.model.facts import Facts
from libreflux.model.parts import json_object
from libreflux.model.source import ModelSource
from libreflux.model.tensor_file import TensorFile
from libreflux.result_key import digest
from libreflux.sample.checks import first_steps_argument

FORMULA = 1
"""Raised when the same model and the same request come to give another picture, not only other last bits."""


def model_key(source: ModelSource, memory: FileMemory) -> dict[str, str]:
    """The weights and configuration of the transformer, the VAE, and the text encoders with their tokenizers.

    Args:
        source: the model; all its weights are fetched.
        memory: knows the files that were read before; of a model that has not changed none is read again.
    """
    source.fetch("transformer", *VAE_PARTS, *TEXT_PARTS)
    config = source.config_file  # of single files without a base the file itself tells all
    return {
        "transformer": source.hash_with(memory.sha256),
        "transformer_config": "" if config is None else config_digest(config),
        "vae": _places_digest(source, VAE_PARTS, memory),
        "text_encoders": _places_digest(source, TEXT_PARTS, memory),
    }


def _places_digest(source: ModelSource, parts: tuple[str, ...], memory: FileMemory) -> str:
    places = source.places(*parts).items()
    return parts_digest({part: at.path if isinstance(at, TensorFile) else at for part, at in places}, memory)


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


def first_steps_key(told: str, source: ModelSource, memory: FileMemory) -> list[Any]:
    """What decides a picture's first steps besides their scale of guidance.

    Args:
        told: "MODEL:N", whose name decides nothing.
        source: that model.
        memory: see `model_key`.
    """
    return [first_steps_argument(told)[1], model_key(source, memory), facts_key(source.facts)]
