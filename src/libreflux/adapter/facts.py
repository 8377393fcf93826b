"""What a model is used with under adapters: they say it in their metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from libreflux.adapter.io import AdapterFile
from libreflux.errors import AdapterError
from libreflux.model.facts import Facts

ADAPTED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "text_padding": ("text_padding", str),
    "max_tokens": ("max_tokens", int),
    "steps": ("sampling_steps", int),
    "guidance": ("guidance", float),
}
"""The facts that training decides: their keys in an adapter's metadata, and their types."""


def adapted_facts(facts: Facts, files: Sequence[tuple[AdapterFile, float]]) -> Facts:
    """The base's facts under adapters: text padding, tokens, steps and guidance as they were trained for.

    Raises:
        AdapterError: two of them were trained with different text paddings.
    """
    said = {file.metadata["text_padding"]: file.where for file, _ in files if "text_padding" in file.metadata}
    if len(said) > 1:
        (one, first), (other, second), *_ = said.items()
        raise AdapterError(
            f"trained with text padding {other}, but {first} with {one}", where=second, hint="use one of the two"
        )
    for file, _ in files:
        try:
            given = {name: kind(file.metadata[key]) for name, (key, kind) in ADAPTED.items() if key in file.metadata}
        except ValueError as error:
            raise AdapterError(f"damaged metadata ({error})", where=file.where, hint="copy it again") from None
        facts = Facts.from_dict(dataclasses.asdict(facts) | given, file.where)
    return facts
