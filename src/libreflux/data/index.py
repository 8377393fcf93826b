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

from libreflux import checksums, plainjson
from libreflux.data.shards import AFRESH, INDEX, SHARDS, Shard, read_shards
from libreflux.errors import DataError
from libreflux.printing import counted, get_logger
from libreflux.result_key import differing

logger = get_logger(__name__)

SCHEMA = 2
PREPARE_AGAIN = "run `libreflux prepare` again"
ELSEWHERE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
"""What sqlite says of a disk, not of a file."""
TEXT_PRECISION = "text_precision"  # a setting
_THEN = {TEXT_PRECISION: "float32"}  # settings that older caches lack, and what they were then
_NO_SUM, _WRONG_SUM = -1, -2  # in the place of a CRC-32
COUNTED = 0  # the shard number of captions whose tokens are counted but not stored
_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, size INTEGER NOT NULL,"
    " sums BLOB, row_crc32 INTEGER)",
    "CREATE TABLE IF NOT EXISTS latents (key INTEGER PRIMARY KEY, shard INTEGER, height INTEGER, width INTEGER,"
    " row_crc32 INTEGER)",
    "CREATE TABLE IF NOT EXISTS texts (key INTEGER PRIMARY KEY, shard INTEGER, tokens INTEGER, row_crc32 INTEGER)",
)
_COLUMNS = {"latents": ("shard", "height", "width"), "texts": ("shard", "tokens")}
_ADDED = {"shards": ("sums BLOB", "row_crc32 INTEGER")} | dict.fromkeys(_COLUMNS, ("row_crc32 INTEGER",))
"""Columns that older caches lack; a row without its sum is taken as it is."""


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
        self.damaged = 0
        """Rows that were left out, see `read_rows`."""

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] row of each key, -1 where it is not here."""
        wanted = np.asarray(keys, dtype=np.int64)
        if not len(self):
            return np.full(len(wanted), -1)
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self) - 1)
        return np.where(self.keys[rows] == wanted, rows, -1)


def read_rows(index: sqlite3.Connection, table: str, shards: Iterable[Shard], left_out: Iterable[int] = ()) -> Rows:
    """All whole rows of ``latents`` or ``texts`` but those of some shards.

    Args:
        shards: as in the index.
        left_out: numbers of shards.

    Returns:
        The rows; `damaged` counts those that are not as their sums say, or are of a shard that the index has not.
    """
    names = _COLUMNS[table]
    found = _integers(index, table, names)
    sums, known = found[:, -1], [COUNTED, *left_out, *(shard.number for shard in shards)]
    columns = found[:, 1:-1]
    whole = (sums == _NO_SUM) | (checksums.of_rows(found[:, :-1]) == sums)
    whole &= np.isin(columns[:, 0], known) & (columns >= 0).all(1) & (columns < 2**31).all(1)
    kept = found[whole & ~np.isin(columns[:, 0], list(left_out))]
    rows = Rows(kept[:, 0], {name: kept[:, 1 + at].astype(np.int32) for at, name in enumerate(names)})
    rows.damaged = int(len(found) - whole.sum())
    return rows


def _integers(index: sqlite3.Connection, table: str, names: Sequence[str]) -> np.ndarray:
    """[N, 2 + columns] int64: key, columns and sum of each row; one of anything else gets a wrong sum."""
    summed = f"coalesce(row_crc32, {_NO_SUM})" if _has(index, table, "row_crc32") else str(_NO_SUM)
    query = f"SELECT key, {', '.join(names)}, {summed} FROM {table}"
    kind = np.dtype((np.int64, (2 + len(names),)))
    try:
        return np.fromiter(index.execute(query), dtype=kind)
    except (TypeError, ValueError, OverflowError):
        rows = index.execute(query).fetchall()
        wrong = (0,) * (1 + len(names)) + (_WRONG_SUM,)
        whole = (row if all(type(one) is int for one in row) else wrong for row in rows)
        return np.fromiter(whole, dtype=kind, count=len(rows))


def add_rows(index: sqlite3.Connection, table: str, rows: Sequence[tuple[int, ...]], instead: str = "") -> None:
    """Inserts rows of ``latents`` or ``texts``, key first, with their sums.

    Args:
        instead: "OR REPLACE" or "OR IGNORE" where keys may be there.
    """
    if not rows:
        return
    names = ("key", *_COLUMNS[table], "row_crc32")
    sums = checksums.of_rows(np.array(rows, np.int64)).tolist()
    query = f"INSERT {instead} INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    index.executemany(query, ((*row, one) for row, one in zip(rows, sums, strict=True)))


def rewrite_rows(index: sqlite3.Connection, folder: Path) -> None:
    """Writes the whole rows of ``latents`` and ``texts`` anew, all with their sums, without the damaged ones."""
    add_columns(index)
    shards = read_shards(index, folder)
    for table, names in _COLUMNS.items():
        rows = read_rows(index, table, shards)
        columns = np.stack([rows.keys, *(rows.columns[name] for name in names)], axis=1)
        index.execute(f"DELETE FROM {table}")
        add_rows(index, table, list(map(tuple, columns.tolist())))
        if rows.damaged:
            told = counted(rows.damaged, "damaged row")
            logger.warning("%s: %s of %s left out", folder / INDEX, told, table)


def has_damaged_rows(folder: Path, index: sqlite3.Connection) -> bool:
    """Whether rows of ``latents`` or ``texts`` are damaged."""
    shards = read_shards(index, folder)
    return any(read_rows(index, table, shards).damaged for table in _COLUMNS)


def drop_damaged(folder: Path, index: sqlite3.Connection) -> list[Path]:
    """Forgets damaged shards and rows; returns the files of those shards."""
    damaged = damaged_shards(folder, index)
    forget_shards(index, damaged)
    if has_damaged_rows(folder, index):
        rewrite_rows(index, folder)
    return [path for path in damaged.values() if path.name != INDEX]


def lacks_sums(index: sqlite3.Connection) -> bool:
    """Whether a crop or a caption has no sum."""
    return any(
        not _has(index, table, "row_crc32")
        or index.execute(f"SELECT 1 FROM {table} WHERE row_crc32 IS NULL LIMIT 1").fetchone()
        for table in _COLUMNS
    )


def add_columns(index: sqlite3.Connection) -> None:
    """Adds the columns that an older cache lacks."""
    for table, columns in _ADDED.items():
        for column in columns:
            if not _has(index, table, column.partition(" ")[0]):
                index.execute(f"ALTER TABLE {table} ADD COLUMN {column}")


def _has(index: sqlite3.Connection, table: str, column: str) -> bool:
    return any(row[1] == column for row in index.execute(f"PRAGMA table_info({table})"))


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
        DataError: see :func:`refusing`; or an empty index of shards.
    """
    if _size(folder / INDEX) == 0 and any((folder / SHARDS).glob("*.safetensors")):  # a kill leaves none of them
        raise DataError("damaged index (it is empty)", where=folder / INDEX, hint=AFRESH)
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
    except UnicodeDecodeError as error:  # of sqlite's own words about a damaged file
        raise DataError(f"damaged index ({error.reason})", where=path, hint=AFRESH) from None
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # what follows the low byte only refines it
        if code in ELSEWHERE:
            raise DataError(str(error), where=path, hint="make room or rights there, or name another place") from None
        if code == sqlite3.SQLITE_BUSY:
            raise DataError("in use by another process", where=path, hint="wait for it or stop it") from None
        raise DataError(f"damaged index ({error})", where=path, hint=AFRESH) from None


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
            add_columns(index)
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
        if index.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise DataError("damaged index (it has no settings)", where=folder / INDEX, hint=AFRESH)
        return {}
    try:
        found = {str(name): plainjson.parse(value) for name, value in index.execute("SELECT name, value FROM settings")}
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"damaged index (settings: {error})", where=folder / INDEX, hint=AFRESH) from None
    schema = found.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise DataError(f"a cache of schema {schema}; this version reads {SCHEMA}", where=folder, hint=AFRESH)
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
        pairs = {name: (known.get(name), wanted.get(name)) for name in names}
        told = ", ".join(f"{name} {_brief(was, now)}, now {_brief(now, was)}" for name, (was, now) in pairs.items())
        hint = "use another cache folder, or remove this one to prepare it afresh"
        raise DataError(f"this cache was made with {told}", where=folder, hint=hint)


def damaged_shards(folder: Path, index: sqlite3.Connection) -> dict[int, Path]:
    """Number of each indexed shard that cannot be read, and what is damaged.

    That is its file, missing or not of its recorded size, or the index itself, whose row of it is damaged.
    """
    # The index first: a shard's file is there before its row. The files first would miss one that is added meanwhile.
    return {
        shard.number: folder / SHARDS / shard.name if shard.whole else folder / INDEX
        for shard in read_shards(index, folder)
        if not shard.whole or _size(folder / SHARDS / shard.name) != shard.size
    }


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


def _brief(value: object, other: object) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 and text[:12] != str(other)[:12] else text
