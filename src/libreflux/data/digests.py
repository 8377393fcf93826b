"""What files are, remembered by path, so that a second run reads none of them again.

A file is taken for the one that is remembered while its size, its modification time and its change time are the same.
Archives, `cp -p` and `touch -d` set the modification time; no program sets the change time (st_ctime). Where the inode
number stays with a file it counts too: two files can swap names within one tick of a clock. A file of another change
time or inode, but of the size and modification time that are remembered, is hashed again, not decoded again: `chmod`
or a move of the whole set costs a reading. A row that an older version wrote has neither: it stands for a file that
has not been changed since the memory was last written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from libreflux import checksums, files
from libreflux.data.index import ELSEWHERE, refusing
from libreflux.data.pictures import Inspected, inspect
from libreflux.data.progress import ProgressCount
from libreflux.files import device_numbers
from libreflux.model.checksums import part_files
from libreflux.model.locate import part_folder
from libreflux.printing import get_logger

logger = get_logger(__name__)

MEMORY = "files.sqlite3"
DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What sqlite raises of a broken file: what it says of a broken schema may itself be broken letters."""
VAE_PARTS = ("vae",)
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, digest TEXT,"
    " width INTEGER, height INTEGER, fault TEXT) WITHOUT ROWID"
)
_SUM = "row_crc32"  # another one: of a row without it nothing is compared
_ADDED = ("ctime", "inode", "rules")  # columns that the first versions of the table lack; `ctime` is at most that
_READ = "size, mtime, digest, width, height, fault"
AT_ONCE = 1024  # what a kill makes read again
_RULES = 1  # raised when `pictures.inspect` comes to say something else of the same bytes: see `_outdated`


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells a file from another one of its name; numbers that the system does not have are 0."""

    size: int
    mtime: int
    ctime: int
    inode: int


@dataclass(frozen=True, slots=True)
class _Row:
    """A remembered file; `latest`: `state.ctime` is the time of the row, not of the file, which has none later."""

    state: FileState
    digest: str
    width: int = 0
    height: int = 0
    fault: str | None = None
    rules: int = _RULES
    latest: bool = False

    def is_of(self, state: FileState) -> bool:
        """Whether nothing can have been written into the file since."""
        known = self.state
        if self.latest:
            return known.ctime >= state.ctime
        return known.ctime == state.ctime and (0 in (known.inode, state.inode) or known.inode == state.inode)


class FileMemory:
    """A memory of files in one sqlite file per folder; what is damaged of it is read again: all can be computed anew.

    Args:
        folder: where this process writes; need not exist.
        others: folders whose memories are read too.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._new: dict[str, _Row] = {}
        self._open: list[_Table] = []
        for path in (each / MEMORY for each in (folder, *others)):
            if path.is_file():
                try:
                    self._open.append(_Table(path))
                except DAMAGED as error:
                    if path.parent == folder and not _is_busy(error):
                        _forget(path, unlink=_code(error) != sqlite3.SQLITE_ERROR)  # that is: without its table

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, as 64 hexadecimal digits."""
        name, state = file_state(path)
        row = self._find(name, state)
        if row is None or not row.is_of(state):
            digest = files.sha256_file(path)
            row = dataclasses.replace(row, state=state, latest=False) if row and row.digest == digest else None
            self._new[name] = row = row or _Row(state, digest)
        return row.digest

    def inspect(self, paths: Sequence[Path], bar: ProgressCount) -> Iterator[Inspected]:
        """What each picture file is, in order; new ones are read by as many threads as there are cores."""
        left, told = len(paths), False
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for part in _batched(paths):
                states = [file_state(path) for path in part]
                known = [self._find(*state) for state in states]
                fresh = [index for index, row in enumerate(known) if row is None or _outdated(row, *states[index])]
                looked = pool.map(_look, [part[index] for index in fresh], [known[index] for index in fresh])
                if fresh and not told:
                    bar.expect(left)
                    told = True
                left -= len(part)
                bar.advance(len(part) - len(fresh) if told else 0)
                for index, found in zip(fresh, looked, strict=True):
                    name, state = states[index]
                    known[index] = new = _Row(state, found.digest, found.width, found.height, found.fault)
                    if found.digest:  # rights come back without a new modification time
                        self._new[name] = new
                    bar.advance(1)
                if len(self._new) >= AT_ONCE:
                    self.save()
                for row in known:
                    assert row is not None
                    assert row.fault is not None
                    yield Inspected(row.digest, row.width, row.height, row.fault)

    def paths_of(self, digests: Set[str], folders: Sequence[Path] | None = None) -> Iterator[tuple[str, Path]]:
        """(digest, path) of all files saved here, those since deleted too, whose digest begins with one of these.

        Args:
            digests: hexadecimal digits, all of them as many.
            folders: only what the memories in these remember; None: in all.
        """
        length = len(next(iter(digests), ""))
        for table in self._open:
            for path, digest in table.digests() if folders is None or table.folder in folders else ():
                if isinstance(path, str) and isinstance(digest, str) and digest[:length] in digests:
                    yield digest[:length], Path(path)

    def save(self) -> None:
        """Writes what is new, if anything is."""
        if not self._new:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / MEMORY
        try:
            _write(path, self._new)
        except DAMAGED as error:
            if _is_busy(error):
                with refusing(path):
                    raise
            _forget(path)  # damaged where nobody has read so far
            with refusing(path):
                _write(path, self._new)
        self._new.clear()

    def add_sums(self) -> None:
        """Gives rows that an older version wrote here their sums, where this can be written."""
        path = self._folder / MEMORY
        if path.is_file():
            with contextlib.suppress(*DAMAGED):
                _add_sums(path)

    def _find(self, name: str, state: FileState) -> _Row | None:
        """The row of a file of this size and modification time; whether of this very file its `is_of` says."""
        of_others = None
        for row in (self._new.get(name), *(table.find(name) for table in self._open)):
            if row is not None and (row.state.size, row.state.mtime) == (state.size, state.mtime):
                if row.is_of(state):
                    return row
                of_others = of_others or row
        return of_others


class _Table:
    """The rows of one memory, to be read; what is damaged of it is not remembered.

    Raises:
        sqlite3.DatabaseError: no database, or a busy one.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, path.stat().st_mtime_ns
        self._connection = sqlite3.connect(path.resolve().as_uri() + "?mode=rw", uri=True, timeout=60)
        try:
            self._connection.execute("SELECT * FROM files LIMIT 1").fetchone()
            known = _columns(self._connection)
            self._added, self._summed = known >= set(_ADDED), _SUM in known
        except DAMAGED:
            self._connection.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the memory lies."""
        return self._path.parent

    def find(self, name: str) -> _Row | None:
        """The row of a path."""
        added = ", ".join(_ADDED) if self._added else f"{self._written}, NULL, 0"
        query = f"SELECT {_READ}, {added}, {_SUM if self._summed else 'NULL'} FROM files WHERE path = ?"
        try:
            found = self._connection.execute(query, (name,)).fetchone()
        except DAMAGED:
            _tell_damaged(str(self._path))
            return None
        if found is None:
            return None
        size, mtime, digest, width, height, fault, ctime, inode, rules, told = found
        whole = all(type(one) is int for one in (size, mtime, width, height, ctime, inode or 0, rules))
        whole &= type(digest) is str and type(fault) in (str, type(None))
        if not whole or told not in (None, checksums.of_values(name, *found[:-1])):
            _tell_damaged(str(self._path))
            return None
        state = FileState(size, mtime, ctime, inode or 0)
        return _Row(state, digest, width, height, fault, rules, latest=inode is None)

    def digests(self) -> Iterator[tuple[str, str]]:
        """(path, digest) of every whole row."""
        names = f"path, {_READ}, {', '.join(_ADDED)}, {_SUM}" if self._added and self._summed else "path, digest, NULL"
        place = names.split(", ").index("digest")
        with contextlib.suppress(*DAMAGED):
            for row in self._connection.execute(f"SELECT {names} FROM files"):
                if row[-1] is None or row[-1] == checksums.of_values(*row[:-1]):
                    yield row[0], row[place]


def _write(path: Path, rows: Mapping[str, _Row]) -> None:
    values = [(name, *_stored(row)) for name, row in rows.items()]
    written = path.stat().st_mtime_ns if path.exists() else 0
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection, connection:
        connection.execute(_TABLE)
        _add_columns(connection, written)
        names = f"path, {_READ}, {', '.join(_ADDED)}, {_SUM}"
        query = f"INSERT OR REPLACE INTO files ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        connection.executemany(query, ((*row, checksums.of_values(*row)) for row in values))


def _add_columns(connection: sqlite3.Connection, written: int) -> None:
    missing = {*_ADDED, _SUM} - _columns(connection)
    for column in sorted(missing):
        connection.execute(f"ALTER TABLE files ADD COLUMN {column} INTEGER")
    if missing - {_SUM}:
        connection.execute("UPDATE files SET ctime = ?, rules = 0", (written,))  # and no inode: see _Row.latest


def _add_sums(path: Path) -> None:
    written = path.stat().st_mtime_ns
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection, connection:
        _add_columns(connection, written)
        query = f"SELECT path, {_READ}, {', '.join(_ADDED)} FROM files WHERE {_SUM} IS NULL"
        sums = [(checksums.of_values(*row), row[0]) for row in connection.execute(query).fetchall()]
        connection.executemany(f"UPDATE files SET {_SUM} = ? WHERE path = ?", sums)


def _is_busy(error: Exception) -> bool:
    """Whether it says something else than that the file is no database, or a broken one."""
    return _code(error) in (*ELSEWHERE, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM)


def _code(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF


def _forget(path: Path, *, unlink: bool = True) -> None:
    _tell_damaged(str(path))
    if unlink:
        with contextlib.suppress(OSError):  # on a disk that is only read
            path.unlink()


@functools.cache  # one line for all rows
def _tell_damaged(path: str) -> None:
    logger.warning("%s is damaged: what it remembered of files is read again", path)


def _stored(row: _Row) -> tuple[int | str | None, ...]:
    state = row.state
    known = (state.size, state.mtime, row.digest, row.width, row.height, row.fault)
    return *known, state.ctime, state.inode, row.rules


def _columns(connection: sqlite3.Connection) -> set[str]:
    return {row[1] for row in connection.execute("PRAGMA table_info(files)")}


def _outdated(row: _Row, name: str, state: FileState) -> bool:
    """Whether a picture must be read: it may be another one, or this version may say something else of it."""
    return row.fault is None or not row.is_of(state) or not _still_said(row, name)


def _still_said(row: _Row, name: str) -> bool:
    """Whether `pictures.inspect` says the same of these bytes today; since rules 1 it refuses some TIFFs."""
    return row.rules == _RULES or not name.lower().endswith((".tif", ".tiff"))


def _look(path: Path, known: _Row | None) -> Inspected:
    """What a picture file is; one that turns out to have the bytes that are remembered is not decoded again."""
    if known is not None and known.fault is not None and _still_said(known, path.name):
        with contextlib.suppress(OSError):
            if files.sha256_file(path) == known.digest:
                return Inspected(known.digest, known.width, known.height, known.fault)
    return inspect(path)


def encoder_digests(model: Path, memory: FileMemory) -> dict[str, str]:
    """What decides latents and what decides text conditioning: a SHA-256 over each one's files in a model folder."""
    return {
        "vae": parts_digest({part: part_folder(model, part) for part in VAE_PARTS}, memory),
        "text_encoders": parts_digest({part: part_folder(model, part) for part in TEXT_PARTS}, memory),
    }


def parts_digest(places: Mapping[str, Path], memory: FileMemory) -> str:
    """A SHA-256 over parts, each with its folder, of which the deciding files count, or its single file."""
    total = hashlib.sha256()
    for part, place in places.items():
        if place.is_file():
            total.update(f"{part}\0{memory.sha256(place)}\n".encode())
        for path in part_files(place):
            total.update(f"{part}/{path.relative_to(place).as_posix()}\0{memory.sha256(path)}\n".encode())
    return total.hexdigest()


def file_state(path: Path) -> tuple[str, FileState]:
    """The real path of a file, and its state now."""
    name = os.path.realpath(path)
    try:
        stat = os.stat(name)
    except OSError:  # a link that leads nowhere: whoever opens it says why
        return name, FileState(-1, 0, 0, 0)
    # File systems without a disk of their own (network, FUSE) may number their files anew at every mount.
    inode = stat.st_ino if device_numbers(stat.st_dev)[0] else 0
    return name, FileState(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, inode)


def _batched(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), AT_ONCE):
        yield paths[start : start + AT_ONCE]
