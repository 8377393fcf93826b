"""A transformer that is written tensor by tensor, and is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from libreflux import plainjson
from libreflux.files import atomic_write_json
from libreflux.model.int8_files import WEIGHTS, numbered, write_int8
from libreflux.model.load import quiet
from libreflux.model.stream import stream_safetensors
from libreflux.model.weight_reader import empty_transformer

SHARD_BYTES = 10 * 2**30
"""Of a dense file at most, as diffusers has it."""


class Tensors(Protocol):
    """Makes the tensors of a transformer."""

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs, as they are written.

        Args:
            names: diffusers' names; they are made in this order. Where int8 is written, a weight may be int8, and
                `<layer>.scale` follows it.
        """


@dataclass(frozen=True, eq=False)
class StreamedTransformer:
    """A transformer for `save_model`, which asks for one tensor after another.

    Attributes:
        config: as of the transformer that it was made of.
        dtype: of what is dense.
        int8: whether it is written in int8, see `int8_files.write_int8`.
        tensors: makes them.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype
    int8: bool
    tensors: Tensors

    def write(self, folder: Path) -> None:
        """Writes a transformer folder, as diffusers does, or in int8.

        Args:
            folder: created; call it inside a staged folder.
        """
        empty = empty_transformer(self.config)
        with quiet():
            config = plainjson.parse(empty.to_json_string())
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        if self.int8:
            write_int8(folder, config, self.tensors(list(shapes)))
            return
        folder.mkdir()
        shards = _shards(shapes, self.dtype.itemsize)
        table: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"{WEIGHTS}.safetensors" if len(shards) == 1 else numbered(number, len(shards))
            layout = {name: (self.dtype, shapes[name]) for name in names}
            stream_safetensors(folder / file, layout, self.tensors(names), {"format": "pt"})
            table |= dict.fromkeys(names, file)
        if len(shards) > 1:
            size = self.dtype.itemsize * sum(map(math.prod, shapes.values()))
            index = {"metadata": {"total_size": size}, "weight_map": table}
            atomic_write_json(folder / f"{WEIGHTS}.safetensors.index.json", index)
        atomic_write_json(
            folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"}
        )


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Names, in their order, as many together as a file may hold."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
