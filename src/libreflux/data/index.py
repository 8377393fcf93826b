"""The sqlite index of a cache: its settings, its shards, and which shard holds which crop or caption.

Crops and captions are known by 64-bit keys, hashes of what decides them: a million rows fit in tens of megabytes. Two
of one key would need some 10⁹ rows; even then the tensors' own names, which are whole, would not be confused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from libreflux import plainjson
from libreflux.decided import differing
from libreflux.errors import DataError

INDEX = "index.sqlite3"
SHARDS = "shards"
SCHEMA = 2
MEND = "run `libreflux prepare` again"
_ELSEWHERE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
TEXT_PRECISION = "text_precision"  # a setting
_THEN = {TEXT_PRECISION: "float32"}  # settings that older caches lack, and what they were then
COUNTED = 0  # the shard number of captions whose tokens are counted but not stored
_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, size INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS latents (key INTEGER PRIMARY KEY, shard INTEGER, height INTEGER, width INTEGER)",
    "CREATE TABLE IF NOT EXISTS texts (key INTEGER PRIMARY KEY, shard INTEGER, tokens INTEGER)",
)
_COLUMNS = {"latents": ("shard", "height", "width"), "texts": ("shard", "tokens")}


def latents_key(picture: str, crop: str) -> int:
    """Signed 64-bit key of one crop of a picture."""
    return _key(f"latents/{picture}/{crop}")


def text_key(caption: str) -> int:
    """Signed 64-bit key of a caption."""
    return _key(f"text/{caption}")


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


class Rows:
    """A table in memory: sorted keys [N] and columns [N], searched by key.

    Args:
        keys: [N] int64, in any order; of equal ones the first counts.
        columns: as many integers each, by name.
    """

    def __init__(self, keys: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        self.keys, first = np.unique(keys, return_index=True)
        self.columns = {name: column[first] for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] row of each key, -1 where it is not here."""
        wanted = np.asarray(keys, dtype=np.int64)
        if not len(self):
            return np.full(len(wanted), -1)
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self) - 1)
        return np.where(self.keys[rows] == wanted, rows, -1)


def read_rows(index: sqlite3.Connection, table: str, left_out: Iterable[int] = ()) -> Rows:
    """All rows of ``latents`` or ``texts`` but those of some shards."""
    names = _COLUMNS[table]
    rows = index.execute(f"SELECT key, {', '.join(names)} FROM {table}")
    kind = np.dtype([("key", np.int64), *((name, np.int32) for name in names)])
    found = np.fromiter(rows, dtype=kind)
    found = found[~np.isin(found["shard"], list(left_out))]
    return Rows(found["key"], {name: found[name] for name in names})


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Several tables as one; of equal keys a row that is stored counts, then the first."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].columns
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
    keys = np.concatenate([part.keys for part in parts])
    order = np.argsort(columns["shard"] == COUNTED, kind="stable")
    return Rows(keys[order], {name: column[order] for name, column in columns.items()})


@contextlib.contextmanager
def connect(folder: Path) -> Iterator[sqlite3.Connection]:
    """An open index; created if need be.

    Raises:
        DataError: see :func:`refusing`.
    """
    with (
        refusing(folder / INDEX),
        contextlib.closing(sqlite3.connect(folder / INDEX, isolation_level=None, timeout=60)) as index,
    ):
        index.execute("PRAGMA synchronous = FULL")
        yield index


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns what sqlite says of a file into one line.

    Raises:
        DataError: the disk is full, does not let it write, or the file is in use or damaged.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # what follows the low byte only refines it
        if code in _ELSEWHERE:
            raise DataError(str(error), where=path, mend="make room or rights there, or name another place") from None
        if code == sqlite3.SQLITE_BUSY:
            raise DataError("in use by another process", where=path, mend="wait for it or stop it") from None
        mend = "remove this cache folder and prepare it afresh"
        raise DataError(f"damaged index ({error})", where=path, mend=mend) from None


@contextlib.contextmanager
def snapshot(index: sqlite3.Connection) -> Iterator[None]:
    """All that is read in the block is of one moment, whatever another process commits meanwhile."""
    index.execute("BEGIN")
    try:
        yield
    finally:
        if index.in_transaction:
            index.execute("ROLLBACK")


@contextlib.contextmanager
def transaction(index: sqlite3.Connection) -> Iterator[None]:
    """All of the block's rows, or none."""
    index.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if index.in_transaction:  # on a full disk sqlite has rolled it back by itself
            index.execute("ROLLBACK")
        raise
    index.execute("COMMIT")


def begin(index: sqlite3.Connection, folder: Path, settings: Mapping[str, Any]) -> None:
    """Creates the tables and writes the settings, or checks those that are there.

    Raises:
        DataError: the cache has other settings, or is of another version.
    """
    with transaction(index):
        if known := read_settings(index, folder):
            refuse_other_settings(folder, known, settings)
            return
        for table in _TABLES:
            index.execute(table)
        rows = [(name, json.dumps(value)) for name, value in {"schema": SCHEMA, **settings}.items()]
        index.executemany("INSERT INTO settings VALUES (?, ?)", rows)


def read_settings(index: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """The cache's settings without its schema number; empty when they were never written.

    Raises:
        DataError: a cache of another version.
    """
    if not index.execute("SELECT 1 FROM sqlite_master WHERE name = 'settings'").fetchone():
        return {}
    found = {name: plainjson.parse(value) for name, value in index.execute("SELECT name, value FROM settings")}
    schema = found.pop("schema", SCHEMA)
    if schema != SCHEMA:
        mend = "remove this cache folder and prepare it afresh"
        raise DataError(f"a cache of schema {schema}; this version reads {SCHEMA}", where=folder, mend=mend)
    return found


def text_precision_of(settings: Mapping[str, Any]) -> str:
    """The dtype that the text encoders computed in: fp32 where a cache's settings do not say."""
    return str(settings.get(TEXT_PRECISION, _THEN[TEXT_PRECISION]))


def refuse_other_settings(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a cache made with other settings.

    Raises:
        DataError: names each setting that differs, with both values.
    """
    if names := differing(known, wanted, _THEN):
        known, wanted = _THEN | dict(known), _THEN | dict(wanted)
        told = ", ".join(f"{name} {_brief(known.get(name))}, now {_brief(wanted.get(name))}" for name in names)
        mend = "use another cache folder, or remove this one to prepare it afresh"
        raise DataError(f"this cache was made with {told}", where=folder, mend=mend)


def damaged_shards(folder: Path, index: sqlite3.Connection) -> dict[int, str]:
    """Number and name of indexed shards whose file is missing or not of its recorded size."""
    # The index first: a shard's file is there before its row. The files first would miss one that is added meanwhile.
    rows = index.execute("SELECT number, name, size FROM shards ORDER BY name").fetchall()
    return {number: name for number, name, size in rows if _size(folder / SHARDS / name) != size}


def forget_shards(index: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Deletes the rows of these shards and of what they hold."""
    for number in numbers:
        for table, column in (("latents", "shard"), ("texts", "shard"), ("shards", "number")):
            index.execute(f"DELETE FROM {table} WHERE {column} = ?", (number,))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _brief(value: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
