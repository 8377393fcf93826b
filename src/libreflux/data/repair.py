"""Removes damaged entries from a cache, so that the next prepare makes only those again.

What is lost, cut short or damaged in the index is seen whenever a cache is prepared. To see a flipped bit in a shard
all of it is read: ``libreflux prepare`` does so; a run compares what it reads.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from libreflux import checksums
from libreflux.data import index as indexing
from libreflux.data.cache import index_folders
from libreflux.data.index import SHARDS
from libreflux.data.progress import ProgressCount
from libreflux.data.shards import Shard, read_shards, set_sums, shard_sums
from libreflux.errors import DataError, LibrefluxError, RunError
from libreflux.files import lock
from libreflux.places import placed
from libreflux.printing import get_logger

logger = get_logger(__name__)


def forget_damaged(folder: Path, own: Path, *, rows: bool = False) -> None:
    """Forgets the shards that are missing or cut short, so that whoever prepares finds missing what they held.

    Those of another division into parts too: nobody may ever again prepare in as many.

    Args:
        folder: of the cache.
        own: what this process writes: `folder` itself, or its part, beside which others may be writing theirs.
        rows: look for damaged rows of crops and captions too, which takes as long as opening the cache.

    Raises:
        RunError: another process is writing what this one has to tidy up.
    """
    for part in tended(folder, own):
        if not _damaged(part, rows):
            continue
        busy = contextlib.nullcontext() if own in (part, folder) else contextlib.suppress(RunError)
        with busy, lock(part), indexing.connect(part) as index, indexing.transaction(index):
            for path in indexing.drop_damaged(part, index):
                path.unlink(missing_ok=True)


def tended(folder: Path, own: Path) -> list[Path]:
    """The folders with an index that a process which writes `own` looks after: all but the parts beside it."""
    return [
        part
        for part in index_folders(folder)
        if part == own or part.parent != own.parent or _count(part) != _count(own)
    ]


def _count(part: Path) -> str:
    return part.name.rpartition("-of-")[2]


def _damaged(part: Path, rows: bool) -> bool:
    with indexing.connect(part) as index:
        if not indexing.read_settings(index, part):
            return False
        return bool(indexing.damaged_shards(part, index)) or (rows and indexing.has_damaged_rows(part, index))


def verify(folder: Path, own: Path, bar: ProgressCount) -> None:
    """Reads all shards of a cache: damaged ones are forgotten, and what was written without checksums gets them.

    A cache that cannot be written stays without them.

    Args:
        folder: of the cache.
        own: see `forget_damaged`.
        bar: counts shards.

    Raises:
        DataError: a shard cannot be read.
        RunError: something of `own` or `folder` is damaged, and another process is writing, or nobody may.
    """
    for part in tended(folder, own):
        found = _look(part, bar)
        if not (found.damaged or found.sums or found.rows):
            continue
        try:
            with placed(part), lock(part), indexing.connect(part) as index, indexing.transaction(index):
                _make_good(index, part, found)
        except LibrefluxError:
            if found.damaged and own in (part, folder):  # else another process may be at it
                raise


@dataclass
class _Found:
    """Shards that are not as their sums say; sums of those that have none; whether rows have none."""

    damaged: list[Shard] = field(default_factory=list)
    sums: list[tuple[Shard, bytes]] = field(default_factory=list)
    rows: bool = False


def _look(part: Path, bar: ProgressCount) -> _Found:
    found = _Found()
    with indexing.connect(part) as index, indexing.snapshot(index):
        if not indexing.read_settings(index, part):
            return found
        lost = indexing.damaged_shards(part, index)
        shards = [shard for shard in read_shards(index, part) if shard.number not in lost]
        found.rows = indexing.lacks_sums(index)
    bar.expect(len(shards))
    with ThreadPoolExecutor(checksums.THREADS) as pool:
        for shard, sums in zip(shards, pool.map(_reader(part), shards), strict=True):
            if shard.sums is None:
                found.sums.append((shard, sums))
            elif shard.sums != sums:
                found.damaged.append(shard)
            bar.advance(1)
    return found


def _reader(part: Path) -> Callable[[Shard], bytes]:
    def read(shard: Shard) -> bytes:
        path = part / SHARDS / shard.name
        try:
            return shard_sums(path)
        except OSError as error:
            told = f"cannot be read ({error.strerror})"
            raise DataError(told, where=path, hint="make it readable, or remove it and prepare again") from None

    return read


def _make_good(index: sqlite3.Connection, part: Path, found: _Found) -> None:
    there = read_shards(index, part)  # another process may have prepared meanwhile
    for shard in found.damaged:
        if shard in there:
            indexing.forget_shards(index, [shard.number])
            (part / SHARDS / shard.name).unlink(missing_ok=True)
            logger.warning("%s was damaged: what it held is made anew", part / SHARDS / shard.name)
    if found.sums or found.rows:
        indexing.rewrite_rows(index, part)
        for shard, sums in found.sums:
            if shard in there:
                set_sums(index, shard.number, shard.name, shard.size, sums)
