"""Latents and text conditioning, computed once: safetensors shards and a sqlite index, whole after any kill.

A shard is written and synced first, its rows are committed after: a kill between the two leaves a file that no row
names, which the next writer removes. Latents are keyed by (picture, crop), text by the caption itself and stored
without padding; what else decides them (encoder hashes, text padding, maximum tokens, precision) is one set of
settings for the whole cache, and a reader or writer with others is refused.

A cache prepared in n parts is n caches in its folder ``parts``; whoever reads it reads them as one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from libreflux.data import index as indexing
from libreflux.data import int8_text
from libreflux.data.index import COUNTED, INDEX, PREPARE_AGAIN, SHARDS, Rows, latents_key, text_key
from libreflux.data.shards import SHARD_NAME, CheckedShard, add_shard, read_shards, shard_sums
from libreflux.errors import DataError
from libreflux.files import atomic_save_safetensors, lock, sweep
from libreflux.model.text import TextConditioning
from libreflux.printing import counted, get_logger

logger = get_logger(__name__)

PARTS = "parts"
LATENTS = {"mean": "float32", "sample": "float32 mean and std"}
"""What is stored of each crop, as the settings call it, by what training reads: see ``Recipe.latents``."""
_OPEN_SHARDS = 64
_PART_STRIDE = 2**20  # shard numbers of part k are shifted by k strides, so that they stay apart when read as one


class Cache:
    """A prepared cache, to be read.

    Args:
        folder: what ``prepare`` wrote.
        partial: take what is whole of a cache that a kill or a lost file left incomplete, instead of refusing it.

    Raises:
        DataError: no cache there, a damaged index, one of another version, parts that differ in settings, or (unless
            ``partial``) rows that are damaged, shards that are missing or cut short.
    """

    def __init__(self, folder: Path | str, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {}
        self.damaged_rows = 0
        """Rows that were left out of a ``partial`` one, see ``index.read_rows``."""
        self._open: OrderedDict[int, CheckedShard] = OrderedDict()
        self._shards: dict[int, tuple[Path, bytes | None, bytearray]] = {}
        tables: dict[str, list[Rows]] = {"latents": [], "texts": []}
        folders = index_folders(self.folder)
        for number, part in enumerate(folders):
            self._read_part(part, number * _PART_STRIDE, partial, tables)
        if not folders:
            raise DataError("no cache in this folder", where=self.folder, hint=PREPARE_AGAIN)
        if not self.settings and not partial:
            raise DataError("this cache was never begun", where=self.folder, hint=PREPARE_AGAIN)
        empty = np.zeros(0, np.int64)
        none = {"shard": empty, "height": empty, "width": empty, "tokens": empty}
        self._latents, self._texts = (
            indexing.join_rows(tables[name] or [Rows(empty, none)]) for name in ("latents", "texts")
        )

    def _read_part(self, folder: Path, shift: int, partial: bool, tables: dict[str, list[Rows]]) -> None:
        with indexing.connect(folder) as index, indexing.snapshot(index):
            settings = indexing.read_settings(index, folder)
            if not settings:
                return
            if self.settings:
                indexing.refuse_other_settings(folder, settings, self.settings)
            self.settings = settings
            damaged = indexing.damaged_shards(folder, index)
            if damaged and not partial:
                where = next(iter(damaged.values()))
                told = "a damaged row" if where.name == INDEX else "missing or cut short"
                raise DataError(told, where=where, hint=self._hint)
            listed = read_shards(index, folder)
            for shard in listed:
                seen = bytearray(len(shard.sums or b"") // 4)
                self._shards[shard.number + shift] = folder / SHARDS / shard.name, shard.sums, seen
            if any(shard.sums is None for shard in listed if shard.whole):
                _tell_unchecked(str(folder))
            for name, found in tables.items():
                rows = indexing.read_rows(index, name, listed, damaged)
                self.damaged_rows += rows.damaged
                if rows.damaged and not partial:
                    told = f"{counted(rows.damaged, 'damaged row')} of {name}"
                    raise DataError(told, where=folder / INDEX, hint=self._hint)
                shards = rows.columns["shard"]
                rows.columns["shard"] = np.where(shards == COUNTED, COUNTED, shards + shift).astype(np.int32)
                found.append(rows)

    @property
    def _hint(self) -> str:
        """What makes damage good: the cache is named, since a recipe on disk may name another."""
        return f"{PREPARE_AGAIN}, into {self.folder}"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses a cache made with other settings; see ``index.refuse_other_settings``."""
        indexing.refuse_other_settings(self.folder, self.settings, settings)

    def sizes(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n, 2] latent height and width of crops by ``index.latents_key``; -1 where one is not here."""
        rows = self._latents.find(keys)
        sizes = np.stack([_take(self._latents, name, rows) for name in ("height", "width")], axis=1)
        return np.where(rows[:, None] < 0, -1, sizes)

    def token_counts(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] text tokens of captions by ``index.text_key``, without padding; -1 where one is not here."""
        rows = self._texts.find(keys)
        return np.where(rows < 0, -1, _take(self._texts, "tokens", rows))

    def stored_texts(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] bool: whether the conditioning of these captions is here, not their token count alone."""
        rows = self._texts.find(keys)
        return (rows >= 0) & (_take(self._texts, "shard", rows) != COUNTED)

    def known_texts(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] bool: whether the token counts of these captions are here."""
        return self._texts.find(keys) >= 0

    def latents(self, picture: str, crop: str) -> Tensor:
        """Normalised posterior mean of one crop, [C, h, w] fp32.

        Raises:
            DataError: not in this cache.
        """
        return self._of_crop(picture, crop, latents_name)

    def latent_std(self, picture: str, crop: str) -> Tensor:
        """Normalised posterior standard deviation of one crop, [C, h, w] fp32.

        Raises:
            DataError: not in this cache, or a cache of means alone.
        """
        if self.settings.get("latents") != LATENTS["sample"]:
            hint = "prepare another cache with latents: sample"
            raise DataError("this cache holds the mean of its latents alone", where=self.folder, hint=hint)
        return self._of_crop(picture, crop, std_name)

    def _of_crop(self, picture: str, crop: str, name: Callable[[str, str], str]) -> Tensor:
        [row] = self._latents.find([latents_key(picture, crop)])
        if row < 0:
            raise DataError(f"crop {crop} of picture {picture} is not here", where=self.folder, hint=PREPARE_AGAIN)
        return self._tensor(int(self._latents.columns["shard"][row]), name(picture, crop))

    def text(self, captions: Sequence[str]) -> TextConditioning:
        """Conditioning of these captions in this order: tokens [S_i, D] without padding and pooled [B, P], bf16.

        Raises:
            DataError: a caption is not stored in this cache.
        """
        tokens, pooled = [], []
        for caption, row in zip(captions, self._texts.find([text_key(caption) for caption in captions]), strict=True):
            shard = COUNTED if row < 0 else int(self._texts.columns["shard"][row])
            if shard == COUNTED:
                raise DataError(f"caption {caption!r} is not here", where=self.folder, hint=PREPARE_AGAIN)
            tokens.append(self._tokens(shard, caption))
            pooled.append(self._tensor(shard, text_name("pooled", caption)))
        return TextConditioning(tokens=tokens, pooled=torch.stack(pooled))

    def _tokens(self, shard: int, caption: str) -> Tensor:
        tokens = self._tensor(shard, text_name("tokens", caption))
        if self.settings["text"] != "int8":
            return tokens
        return int8_text.dequantise(tokens, self._tensor(shard, text_name("scales", caption)))

    def _tensor(self, shard: int, name: str) -> Tensor:
        path, sums, seen = self._shards[shard]
        try:
            if shard not in self._open:
                self._open[shard] = CheckedShard(path, sums, seen)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard].read(name)
        except (FileNotFoundError, PermissionError):  # safetensors says the first of a file without rights too
            if path.exists():
                raise DataError("cannot be read", where=path, hint="make it readable") from None
            raise DataError("has gone since the cache was opened", where=path, hint=PREPARE_AGAIN) from None
        except (OSError, SafetensorError) as error:
            raise DataError(f"damaged shard ({error})", where=path, hint=self._hint) from None


class CacheWriter:
    """Adds to a cache; use :func:`writing`, which holds the folder's lock."""

    def __init__(self, folder: Path, index: sqlite3.Connection, settings: Mapping[str, Any]) -> None:
        self.folder, self._index, self._text_precision = folder, index, settings["text"]
        self.wants_std = settings.get("latents") == LATENTS["sample"]
        """Whether the settings ask for the standard deviation of latents too."""
        (folder / SHARDS).mkdir(exist_ok=True)
        self._drop_damaged()
        self._sweep()

    def add_latents(
        self, found: Mapping[tuple[str, str], Tensor], std: Mapping[tuple[str, str], Tensor] | None = None
    ) -> None:
        """Stores crops [C, h, w] by (picture, crop name): one shard, all or nothing.

        Args:
            found: means.
            std: standard deviations of the same crops, if the cache `wants_std`; else None.

        Raises:
            ValueError: they are not what the cache wants.
        """
        if (std or {}).keys() != (found.keys() if self.wants_std else set()):
            raise ValueError("every crop has a std in a cache that wants them, and none in another")
        tensors = {latents_name(*key): tensor for key, tensor in found.items()}
        tensors |= {std_name(*key): tensor for key, tensor in (std or {}).items()}
        with self.write_shard("latents", tensors) as shard:
            rows = [(latents_key(*key), shard, *tensor.shape[-2:]) for key, tensor in found.items()]
            indexing.add_rows(self._index, "latents", rows)

    def add_texts(self, captions: Sequence[str], text: TextConditioning) -> int:
        """Stores distinct captions with their conditioning: one shard, all or nothing; returns the tensors' bytes.

        The pooled vector is stored in bf16, tokens in bf16 or int8 as the cache's settings say.
        """
        tensors: dict[str, Tensor] = {}
        for caption, tokens, pooled in zip(captions, text.tokens, text.pooled, strict=True):
            if self._text_precision == "int8":
                values, tensors[text_name("scales", caption)] = int8_text.quantise(tokens)
                tensors[text_name("tokens", caption)] = values
            else:
                tensors[text_name("tokens", caption)] = tokens.to(torch.bfloat16)
            # A row of the batch: safetensors refuses shared memory.
            tensors[text_name("pooled", caption)] = pooled.to(torch.bfloat16).clone()
        with self.write_shard("texts", tensors) as shard:
            rows = [(text_key(caption), shard, count) for caption, count in zip(captions, text.lengths, strict=True)]
            indexing.add_rows(self._index, "texts", rows, "OR REPLACE")
        return sum(tensor.nbytes for tensor in tensors.values())

    def add_token_counts(self, captions: Sequence[str], counts: Sequence[int]) -> None:
        """Notes the tokens of distinct captions that are not stored."""
        rows = [(text_key(caption), COUNTED, count) for caption, count in zip(captions, counts, strict=True)]
        with indexing.transaction(self._index):
            indexing.add_rows(self._index, "texts", rows, "OR IGNORE")

    @contextlib.contextmanager
    def write_shard(self, kind: str, tensors: dict[str, Tensor]) -> Iterator[int]:
        """Writes one shard, and gives its number; its rows are added in the block, and committed at its end."""
        [last] = self._index.execute("SELECT max(name) FROM shards WHERE name LIKE ?", (f"{kind}-%",)).fetchone()
        number = int(last.removeprefix(f"{kind}-").removesuffix(".safetensors")) + 1 if last else 0
        name = f"{kind}-{number:08d}.safetensors"
        path = self.folder / SHARDS / name
        atomic_save_safetensors(tensors, path, {"schema": "1"})
        with indexing.transaction(self._index):
            yield add_shard(self._index, name, path.stat().st_size, shard_sums(path))

    def _drop_damaged(self) -> None:
        with indexing.transaction(self._index):
            indexing.drop_damaged(self.folder, self._index)

    def _sweep(self) -> None:
        sweep(self.folder / SHARDS)
        named = {name for (name,) in self._index.execute("SELECT name FROM shards")}
        for path in (self.folder / SHARDS).iterdir():
            if path.name not in named and SHARD_NAME.fullmatch(path.name):
                path.unlink()


def index_folders(folder: Path) -> list[Path]:
    """The folders that hold an index: the cache's own and those of its parts."""
    return [each for each in (folder, *sorted((folder / PARTS).glob("*"))) if (each / INDEX).is_file()]


@functools.cache  # a run opens its cache more than once
def _tell_unchecked(folder: str) -> None:
    logger.warning("%s was written without checksums: `libreflux prepare` adds them, encoding nothing", folder)


@contextlib.contextmanager
def writing(folder: Path, settings: Mapping[str, Any]) -> Iterator[CacheWriter]:
    """Locks, creates if need be, and opens a cache for adding.

    Raises:
        DataError: the cache has other settings.
        RunError: another process is writing it.
    """
    with lock(folder), indexing.connect(folder) as index:
        indexing.begin(index, folder, settings)
        yield CacheWriter(folder, index, settings)


def latents_name(picture: str, crop: str) -> str:
    """Tensor name of a crop inside its shard."""
    return f"{picture}/{crop}"


def std_name(picture: str, crop: str) -> str:
    """Tensor name of a crop's standard deviation, in the same shard."""
    return f"std/{latents_name(picture, crop)}"


def text_name(part: str, caption: str) -> str:
    """Tensor name of a caption's ``tokens``, ``scales`` (of int8 tokens) or ``pooled`` inside its shard."""
    return f"{part}/{hashlib.sha256(caption.encode()).hexdigest()[:32]}"


def _take(rows: Rows, column: str, where: np.ndarray) -> np.ndarray:
    return rows.columns[column][where] if len(rows) else where
