"""What files are, remembered by (path, size, modification time), so that a second run reads none of them again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from libreflux import files
from libreflux.data.bar import Bar
from libreflux.data.index import refusing
from libreflux.data.pictures import Inspected, inspect
from libreflux.model.locate import part_folder

MEMORY = "files.sqlite3"
VAE_PARTS = ("vae",)
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
DECIDING = frozenset({".json", ".safetensors", ".model", ".txt"})
_TABLE = (
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, digest TEXT,"
    " width INTEGER, height INTEGER, fault TEXT) WITHOUT ROWID"
)
_AT_ONCE = 1024  # what a kill makes read again

Row = tuple[int, int, str, int, int, str | None]


class FileMemory:
    """A memory of files in one sqlite file per folder; a damaged one is forgotten, it holds only what can be computed.

    Args:
        folder: where this process writes; need not exist.
        others: folders whose memories are read too.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._new: dict[str, Row] = {}
        self._open: list[sqlite3.Connection] = []
        for path in (each / MEMORY for each in (folder, *others)):
            if path.is_file():
                connection = sqlite3.connect(path.resolve().as_uri() + "?mode=rw", uri=True, timeout=60)
                try:
                    connection.execute("SELECT * FROM files LIMIT 1").fetchone()
                    self._open.append(connection)
                except sqlite3.DatabaseError as error:
                    connection.close()
                    if path.parent == folder and not isinstance(error, sqlite3.OperationalError):
                        path.unlink()  # no database at all, or a broken one; not one that is busy

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, as 64 hexadecimal digits."""
        name, size, mtime = _state(path)
        row = self._find(name, size, mtime)
        if row is None:
            row = (size, mtime, files.sha256_file(path), 0, 0, None)
            self._new[name] = row
        return row[2]

    def inspect(self, paths: Sequence[Path], bar: Bar) -> Iterator[Inspected]:
        """What each picture file is, in order; new ones are read by as many threads as there are cores."""
        left, told = len(paths), False
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for part in _batched(paths):
                states = [_state(path) for path in part]
                known = [self._find(*state) for state in states]
                fresh = [index for index, row in enumerate(known) if row is None or row[5] is None]
                looked = pool.map(inspect, [part[index] for index in fresh])
                if fresh and not told:
                    bar.expect(left)
                    told = True
                left -= len(part)
                bar.advance(len(part) - len(fresh) if told else 0)
                for index, found in zip(fresh, looked, strict=True):
                    name, size, mtime = states[index]
                    new: Row = (size, mtime, found.digest, found.width, found.height, found.fault)
                    known[index] = new
                    if found.digest:  # rights come back without a new modification time
                        self._new[name] = new
                    bar.advance(1)
                if len(self._new) >= _AT_ONCE:
                    self.save()
                for row in known:
                    assert row is not None and row[5] is not None
                    yield Inspected(*row[2:5], row[5])

    def paths_of(self, digests: Set[str]) -> Iterator[tuple[str, Path]]:
        """(digest, path) of all files saved here, those since deleted too, whose digest begins with one of these.

        Args:
            digests: hexadecimal digits, all of them as many.
        """
        length = len(next(iter(digests), ""))
        for connection in self._open:
            for path, digest in connection.execute("SELECT path, digest FROM files"):
                if digest[:length] in digests:
                    yield digest[:length], Path(path)

    def save(self) -> None:
        """Writes what is new, if anything is."""
        if not self._new:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = [(name, *row) for name, row in self._new.items()]
        path = self._folder / MEMORY
        with refusing(path), contextlib.closing(sqlite3.connect(path, timeout=60)) as connection, connection:
            connection.execute(_TABLE)
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._new.clear()

    def _find(self, name: str, size: int, mtime: int) -> Row | None:
        row = self._new.get(name)
        if row is not None and row[:2] == (size, mtime):
            return row
        for connection in self._open:
            row = connection.execute(
                "SELECT size, mtime, digest, width, height, fault FROM files WHERE path = ?", (name,)
            ).fetchone()
            if row is not None and row[:2] == (size, mtime):
                return row
        return None


def encoder_digests(model: Path, memory: FileMemory) -> dict[str, str]:
    """What decides latents and what decides text conditioning: a SHA-256 over each one's files in a model folder."""
    return {
        "vae": _parts_digest(model, VAE_PARTS, memory),
        "text_encoders": _parts_digest(model, TEXT_PARTS, memory),
    }


def _parts_digest(model: Path, parts: tuple[str, ...], memory: FileMemory) -> str:
    total = hashlib.sha256()
    for part in parts:
        folder = part_folder(model, part)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in DECIDING and not path.name.startswith("."):
                total.update(f"{part}/{path.relative_to(folder).as_posix()}\0{memory.sha256(path)}\n".encode())
    return total.hexdigest()


def _state(path: Path) -> tuple[str, int, int]:
    name = os.path.realpath(path)
    try:
        stat = os.stat(name)
    except OSError:  # a link that leads nowhere: whoever opens it says why
        return name, -1, 0
    return name, stat.st_size, stat.st_mtime_ns


def _batched(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), _AT_ONCE):
        yield paths[start : start + _AT_ONCE]
