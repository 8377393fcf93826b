"""Latents and text conditioning, computed once: safetensors shards and a sqlite index, whole after any kill.

A shard is written and synced first, its rows are committed after: a kill between the two leaves a file that no row
names, which the next writer removes. Latents are keyed by (picture, crop), text by the caption itself and stored
without padding; what else decides them (encoder hashes, text padding, maximum tokens, precision, resolution) is one
set of settings for the whole cache, and a reader or writer with others is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libreflux.errors import DataError
from libreflux.files import atomic_save_safetensors, lock
from libreflux.model.text import TextConditioning

INDEX = "index.sqlite3"
SHARDS = "shards"
MEND = "run `libreflux prepare` again"
_OPEN_SHARDS = 64
_OURS = re.compile(r"(latents|texts)-\d{8}\.safetensors|\.(latents|texts)-\d{8}\.safetensors\.tmp-.*")
_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, size INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS latents (picture TEXT, crop TEXT, shard TEXT NOT NULL, PRIMARY KEY (picture, crop))",
    "CREATE TABLE IF NOT EXISTS texts (caption TEXT PRIMARY KEY, shard TEXT NOT NULL)",
)


class Cache:
    """A prepared cache, to be read.

    Args:
        folder: what ``prepare`` wrote.
        partial: take what is whole of a cache that a kill or a lost file left incomplete, instead of refusing it.

    Raises:
        DataError: no cache there, a damaged index, or (unless ``partial``) shards that are missing or cut short.
    """

    def __init__(self, folder: Path | str, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise DataError("no cache in this folder", where=self.folder, mend=MEND)
        self._latents: dict[tuple[str, str], str] = {}
        self._texts: dict[str, str] = {}
        self._shards: OrderedDict[str, Any] = OrderedDict()
        with _connect(self.folder) as index:
            self.settings = read_settings(index)
            if self.settings:
                damaged = damaged_shards(self.folder, index)
                if damaged and not partial:
                    raise DataError("missing or cut short", where=self.folder / SHARDS / min(damaged), mend=MEND)
                for picture, crop, shard in index.execute("SELECT picture, crop, shard FROM latents"):
                    if shard not in damaged:
                        self._latents[picture, crop] = shard
                for caption, shard in index.execute("SELECT caption, shard FROM texts"):
                    if shard not in damaged:
                        self._texts[caption] = shard
            elif not partial:
                raise DataError("this cache was never begun", where=self.folder, mend=MEND)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses a cache made with other settings; see :func:`refuse_other_settings`."""
        refuse_other_settings(self.folder, self.settings, settings)

    def has_latents(self, picture: str, crop: str) -> bool:
        """Whether this crop of this picture is here."""
        return (picture, crop) in self._latents

    def has_text(self, caption: str) -> bool:
        """Whether this caption is here; "" is the empty prompt."""
        return caption in self._texts

    def latents(self, picture: str, crop: str) -> Tensor:
        """Normalised posterior mean of one crop, [C, h, w] fp32.

        Raises:
            DataError: not in this cache.
        """
        shard = self._latents.get((picture, crop))
        if shard is None:
            raise DataError(f"crop {crop} of picture {picture} is not here", where=self.folder, mend=MEND)
        return self._tensor(shard, latents_name(picture, crop))

    def text(self, captions: Sequence[str]) -> TextConditioning:
        """Conditioning of these captions in this order: tokens [S_i, D] without padding and pooled [B, P], bf16.

        Raises:
            DataError: a caption is not in this cache.
        """
        tokens, pooled = [], []
        for caption in captions:
            shard = self._texts.get(caption)
            if shard is None:
                raise DataError(f"caption {caption!r} is not here", where=self.folder, mend=MEND)
            tokens.append(self._tensor(shard, text_name("tokens", caption)))
            pooled.append(self._tensor(shard, text_name("pooled", caption)))
        return TextConditioning(tokens=tokens, pooled=torch.stack(pooled))

    def _tensor(self, shard: str, name: str) -> Tensor:
        path = self.folder / SHARDS / shard
        try:
            if shard not in self._shards:
                self._shards[shard] = safe_open(path, framework="pt")
                if len(self._shards) > _OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            tensor: Tensor = self._shards[shard].get_tensor(name)
        except (OSError, SafetensorError) as error:
            mend = "remove this file and run `libreflux prepare` again"
            raise DataError(f"damaged shard ({error})", where=path, mend=mend) from None
        return tensor


class CacheWriter:
    """Adds to a cache; use :func:`writing`, which holds the folder's lock."""

    def __init__(self, folder: Path, index: sqlite3.Connection) -> None:
        self.folder, self._index = folder, index
        (folder / SHARDS).mkdir(exist_ok=True)
        self._drop_damaged()
        self._sweep()

    def add_latents(self, found: Mapping[tuple[str, str], Tensor]) -> None:
        """Stores crops [C, h, w] by (picture, crop name): one shard, all or nothing."""
        tensors = {latents_name(*key): tensor for key, tensor in found.items()}
        with self._shard("latents", tensors) as shard:
            rows = [(picture, crop, shard) for picture, crop in found]
            self._index.executemany("INSERT INTO latents (picture, crop, shard) VALUES (?, ?, ?)", rows)

    def add_texts(self, captions: Sequence[str], text: TextConditioning) -> None:
        """Stores distinct captions with their conditioning, row by row: one shard, all or nothing."""
        tensors: dict[str, Tensor] = {}
        for caption, tokens, pooled in zip(captions, text.tokens, text.pooled, strict=True):
            tensors[text_name("tokens", caption)] = tokens
            tensors[text_name("pooled", caption)] = (
                pooled.clone()
            )  # a row of the batch: safetensors refuses shared memory
        with self._shard("texts", tensors) as shard:
            rows = [(caption, shard) for caption in captions]
            self._index.executemany("INSERT INTO texts (caption, shard) VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _shard(self, kind: str, tensors: dict[str, Tensor]) -> Iterator[str]:
        [last] = self._index.execute("SELECT max(name) FROM shards WHERE name LIKE ?", (f"{kind}-%",)).fetchone()
        number = int(last.removeprefix(f"{kind}-").removesuffix(".safetensors")) + 1 if last else 0
        name = f"{kind}-{number:08d}.safetensors"
        path = self.folder / SHARDS / name
        atomic_save_safetensors(tensors, path, {"schema": "1"})
        with transaction(self._index):
            self._index.execute("INSERT INTO shards VALUES (?, ?)", (name, path.stat().st_size))
            yield name

    def _drop_damaged(self) -> None:
        with transaction(self._index):
            for name in damaged_shards(self.folder, self._index):
                for table, column in (("latents", "shard"), ("texts", "shard"), ("shards", "name")):
                    self._index.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))

    def _sweep(self) -> None:
        named = {name for (name,) in self._index.execute("SELECT name FROM shards")}
        for path in (self.folder / SHARDS).iterdir():
            if path.name not in named and _OURS.fullmatch(path.name):
                path.unlink()


@contextlib.contextmanager
def writing(folder: Path, settings: Mapping[str, Any]) -> Iterator[CacheWriter]:
    """Locks, creates if need be, and opens a cache for adding.

    Raises:
        DataError: the cache has other settings.
        RunError: another process is writing it.
    """
    with lock(folder), _connect(folder) as index:
        with transaction(index):
            for table in _TABLES:
                index.execute(table)
            known = read_settings(index)
            if known:
                refuse_other_settings(folder, known, settings)
            else:
                rows = [(name, json.dumps(value)) for name, value in settings.items()]
                index.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        yield CacheWriter(folder, index)


def refuse_other_settings(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a cache made with other settings.

    Raises:
        DataError: names each setting that differs, with both values.
    """
    differing = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if differing:
        told = ", ".join(f"{name} {_brief(known.get(name))}, now {_brief(wanted.get(name))}" for name in differing)
        mend = "use another cache folder, or remove this one to prepare it afresh"
        raise DataError(f"this cache was made with {told}", where=folder, mend=mend)


def read_settings(index: sqlite3.Connection) -> dict[str, Any]:
    """The cache's settings; empty when they were never written."""
    if not index.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone():
        return {}
    return {name: json.loads(value) for name, value in index.execute("SELECT name, value FROM settings")}


def damaged_shards(folder: Path, index: sqlite3.Connection) -> set[str]:
    """Names of indexed shards whose file is missing or not of its recorded size."""
    sizes = {path.name: path.stat().st_size for path in (folder / SHARDS).glob("*.safetensors")}
    return {name for name, size in index.execute("SELECT name, size FROM shards") if sizes.get(name) != size}


def latents_name(picture: str, crop: str) -> str:
    """Tensor name of a crop inside its shard."""
    return f"{picture}/{crop}"


def text_name(part: str, caption: str) -> str:
    """Tensor name of a caption's ``tokens`` or ``pooled`` inside its shard."""
    return f"{part}/{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


@contextlib.contextmanager
def transaction(index: sqlite3.Connection) -> Iterator[None]:
    """All of the block's rows, or none."""
    index.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        index.execute("ROLLBACK")
        raise
    index.execute("COMMIT")


@contextlib.contextmanager
def _connect(folder: Path) -> Iterator[sqlite3.Connection]:
    index = sqlite3.connect(folder / INDEX, isolation_level=None, timeout=60)
    try:
        index.execute("PRAGMA synchronous = FULL")
        yield index
    except sqlite3.DatabaseError as error:
        mend = "remove this cache folder and prepare it afresh"
        raise DataError(f"damaged index ({error})", where=folder / INDEX, mend=mend) from None
    finally:
        index.close()


def _brief(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
