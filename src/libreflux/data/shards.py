"""The shards of a cache: their rows in the index, and the sums of their files.

A shard is summed by chunks, so that a tensor is compared without the rest of its shard being read.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libreflux import checksums
from libreflux.errors import DataError
from libreflux.model.ranges import RangedFile

INDEX = "index.sqlite3"
SHARDS = "shards"
SHARD_NAME = re.compile(r"(latents|texts)-\d{8,}\.safetensors", re.ASCII)
CHUNK = 2**18
"""Bytes of a shard that have one sum: as many as a crop of 512 pixels has. Caches hold such sums: it never changes."""
AFRESH = "remove this cache folder and prepare it afresh"


class Shard(NamedTuple):
    """A row of the shards: `sums` has 4 bytes, little-endian, for each `CHUNK` of its file; None in older caches."""

    number: int
    name: str
    size: int
    sums: bytes | None
    whole: bool


def read_shards(index: sqlite3.Connection, folder: Path) -> list[Shard]:
    """All shards of an index, by name; a row that is not as its sum says is not `whole`, and no file is asked for it.

    Raises:
        DataError: a name that is no shard's: it could lead to any file.
    """
    found = []
    for row in index.execute("SELECT * FROM shards").fetchall():
        if type(row[0]) is not int or len(row) not in (3, 5):
            raise DataError("damaged index (its table of shards)", where=folder / INDEX, hint=AFRESH)
        number, name, size, sums, told = row if len(row) == 5 else (*row, None, None)
        added = (sums, told) != (None, None)
        whole = not added or told == _shard_sum(number, name, size, sums)
        if whole and not (isinstance(name, str) and SHARD_NAME.fullmatch(name)):
            raise DataError(f"names a shard {str(name)!r}, which is no shard's name", where=folder / INDEX, hint=AFRESH)
        found.append(Shard(number, str(name), size, sums if whole else None, whole))
    return sorted(found, key=lambda shard: shard.name)


def _shard_sum(number: int, name: str, size: int, sums: bytes | None) -> int:
    return checksums.of_values(number, name, size, sums)


def add_shard(index: sqlite3.Connection, name: str, size: int, sums: bytes) -> int:
    """Inserts a shard and returns its number."""
    number = index.execute("INSERT INTO shards (name, size) VALUES (?, ?)", (name, size)).lastrowid
    assert number is not None
    set_sums(index, number, name, size, sums)
    return number


def set_sums(index: sqlite3.Connection, number: int, name: str, size: int, sums: bytes) -> None:
    """Gives a shard its sums."""
    row = (sums, _shard_sum(number, name, size, sums), number)
    index.execute("UPDATE shards SET sums = ?, row_crc32 = ? WHERE number = ?", row)


def shard_sums(path: Path, first: int = 0, count: int | None = None) -> bytes:
    """What `Shard.sums` is of a file, or of `count` of its chunks from number `first` on.

    Raises:
        OSError: it cannot be read.
    """
    return np.array(checksums.of_file(path, CHUNK, first, count), "<u4").tobytes()


class CheckedShard:
    """The tensors of a shard, each compared with the shard's sums when it is first read: its own bytes, no others.

    Args:
        path: the file.
        sums: see `Shard`; None: nothing is compared.
        seen: a byte for each sum, not 0 once its chunk was compared: kept by whoever opens the shard again.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is no whole safetensors file, or its header is not as its sums say.
    """

    def __init__(self, path: Path, sums: bytes | None, seen: bytearray | None = None) -> None:
        self._path, self._sums = path, sums
        self._seen = bytearray(len(sums or b"") // 4) if seen is None else seen
        if sums is not None:
            with open(path, "rb") as file:
                self._check(0, 8 + int.from_bytes(file.read(8), "little"), "its beginning")
            self._ranges = RangedFile(path).ranges
        self._file = safe_open(path, framework="pt")

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            SafetensorError: it is not here, or not as its sums say.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if self._sums is not None:
            where = self._ranges[name]
            self._check(where.start, where.end, f"{name}, or what lies beside it,")
        return tensor

    def _check(self, start: int, end: int, what: str) -> None:
        assert self._sums is not None
        chunks = range(start // CHUNK, min(-(-end // CHUNK), len(self._sums) // 4))
        if all(self._seen[chunks.start : chunks.stop]):
            return
        found = shard_sums(self._path, chunks.start, len(chunks))
        if found != self._sums[4 * chunks.start : 4 * chunks.stop]:
            raise SafetensorError(f"{what} is not as its checksum says")
        self._seen[chunks.start : chunks.stop] = b"\1" * len(chunks)
