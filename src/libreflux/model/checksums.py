"""The checksums of a model folder: `checksums.json` beside its parts, compared while the parts are read.

An int8 folder is written with one. Each of a model's files is in it under its place from the model's folder, those of
a neighbour that the transformer's index names too. A file is compared once in a process, as long as it stays the same.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from libreflux import checksums, plainjson
from libreflux.errors import ModelError
from libreflux.files import atomic_write_json
from libreflux.model.facts import FACTS_FILE
from libreflux.model.locate import CHECKSUMS, PARTS
from libreflux.model.ranges import RangedFile
from libreflux.printing import get_logger

logger = get_logger(__name__)

SCHEMA = 1
CHUNK = 2**22
"""Bytes of a file that have one sum, 4 MiB: 12 GB have 3,000."""
_DECIDING = frozenset({".json", ".safetensors", ".model", ".txt"})
SEGMENT = 16  # chunks that a thread takes at once, 64 MiB
_COPY = f"copy or download it again; if you changed it yourself, remove {CHECKSUMS}"
_BAD_TABLE = "copy or download it again, or remove it: nothing is compared without it"
compared: set[tuple[str, ...]] = set()  # files of this process that were compared, with what they were then


def part_files(folder: Path) -> list[Path]:
    """The files of a part's folder that decide something."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in _DECIDING and path.is_file())
    return [path for path in found if not path.name.startswith(".")]


def write_checksums(folder: Path, also: Iterable[Path] = ()) -> None:
    """Writes `checksums.json` of all parts in a model's folder; call it when the rest of it is written.

    Args:
        folder: the model's.
        also: files beside it that its transformer's index names.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _root_files(folder)}
    for part in PARTS:
        files |= {path.relative_to(folder).as_posix(): path for path in part_files(folder / part)}
    files |= {_name(path, folder): path for path in also}
    with ThreadPoolExecutor(checksums.THREADS) as pool:
        asked = {name: _ask(pool, path) for name, path in files.items()}
        table = {name: _joined(sums) for name, sums in asked.items()}
    value = {"schema": SCHEMA, "chunk": CHUNK, "files": table}
    atomic_write_json(folder / CHECKSUMS, {**value, "crc32": f"{checksums.of_json(value):08x}"})


def check_small(folder: Path) -> None:
    """Compares what is read before any part is: the facts and the transformer's configuration.

    Raises:
        ModelError: one of them, or the checksums themselves, are damaged.
    """
    config = folder / "transformer" / "config.json"
    with verified(folder, [*_root_files(folder), *([config] if config.is_file() else [])]):
        pass


def tell_unchecked(folder: Path) -> None:
    """Says once in a process of an int8 model that it has no checksums."""
    if not (folder / CHECKSUMS).is_file():
        _tell_unchecked(str(folder))


@functools.cache  # a command opens a model more than once
def _tell_unchecked(folder: str) -> None:
    logger.warning("%s has no %s: damage on the disk would not be noticed; export it again for them", folder, CHECKSUMS)


@contextlib.contextmanager
def verified_part(folder: Path, also: Sequence[Path] = ()) -> Iterator[None]:
    """Compares the files of a part beside the block that reads them; see `verified`.

    Args:
        folder: the part's, in its model's folder.
        also: files elsewhere that it is read from.
    """
    with verified(folder.parent, [*part_files(folder), *also], whole=folder.name):
        yield


@contextlib.contextmanager
def verified(model: Path, files: Sequence[Path], whole: str | None = None) -> Iterator[None]:
    """Compares files with a model's checksums, in threads beside the block that reads them; nothing if it has none.

    Args:
        model: its folder.
        files: what the block reads.
        whole: a part of which every listed file must be there.

    Raises:
        ModelError: a damaged file, named, whatever the block said of it; or, at its end, one that is missing or has no
            checksum.
    """
    table = read_table(model)
    if table is None:
        yield
        return
    names = {_name(path, model): path for path in files}
    known = {name: path for name, path in names.items() if name in table and _key(path, table[name]) not in compared}
    pool = ThreadPoolExecutor(checksums.THREADS) if known else None
    try:
        asked = {} if pool is None else {name: _ask(pool, path) for name, path in known.items()}
        try:
            yield
        except Exception as error:
            _compare(known, asked, table, error)
            raise
        _compare(known, asked, table, None)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    for name, path in names.items():
        if name not in table and path.suffix == ".safetensors":
            raise ModelError(f"is not in {CHECKSUMS}", where=path, hint=f"remove the file, or {CHECKSUMS}")
    if gone := [name for name in table if whole and name.startswith(f"{whole}/") and name not in names]:
        raise ModelError(f"missing: it is in {CHECKSUMS}", where=model / gone[0], hint="copy or download it again")


def _compare(
    files: dict[str, Path], asked: dict[str, list[Future[list[int]]]], table: dict[str, str], cause: Exception | None
) -> None:
    for name, path in files.items():
        try:
            key, found = _key(path, table[name]), _joined(asked[name])
        except OSError:
            if cause is not None:  # it says so itself
                continue
            raise
        if found != table[name]:
            told = f"damaged{_near(path, found, table[name])}: not as in {CHECKSUMS}"
            raise ModelError(told, where=path, hint=_COPY) from cause
        compared.add(key)


def _near(path: Path, found: str, wanted: str) -> str:
    """Which tensor the first chunk that differs has to do with, where the file's header still says so."""
    if path.suffix != ".safetensors" or len(found) != len(wanted):
        return ""
    [first, *_] = (at for at in range(0, len(found), 8) if found[at : at + 8] != wanted[at : at + 8])
    start = first // 8 * CHUNK
    with contextlib.suppress(OSError, SafetensorError):
        ranges = sorted(RangedFile(path).ranges.items(), key=lambda one: one[1].start)
        here = [name for name, where in ranges if where.end > start and where.start < start + CHUNK]
        if here:
            return f" in {here[0]}" if len(here) == 1 else f" between {here[0]} and {here[-1]}"
    return ""


def read_table(model: Path) -> dict[str, str] | None:
    """Place of a file → its sums, 8 hexadecimal digits a chunk; None where there are none."""
    path = model / CHECKSUMS
    try:
        value: Any = plainjson.parse(path.read_text(encoding="utf-8"))
        told = value.pop("crc32")
        if not isinstance(told, str) or told != f"{checksums.of_json(value):08x}":
            raise ValueError("its own sum differs")
        if (value["schema"], value["chunk"]) != (SCHEMA, CHUNK):
            raise ModelError("checksums of a later version", where=path, hint="update libreflux")
        return {str(name): str(sums) for name, sums in value["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"damaged checksums ({error})", where=path, hint=_BAD_TABLE) from None


def _root_files(model: Path) -> list[Path]:
    return [model / name for name in ("model_index.json", FACTS_FILE) if (model / name).is_file()]


def _ask(pool: ThreadPoolExecutor, path: Path) -> list[Future[list[int]]]:
    chunks = max(1, -(-path.stat().st_size // CHUNK)) if path.is_file() else 1
    return [pool.submit(checksums.of_file, path, CHUNK, first, SEGMENT) for first in range(0, chunks, SEGMENT)]


def _joined(sums: Iterable[Future[list[int]]]) -> str:
    return "".join(f"{one:08x}" for each in sums for one in each.result())


def _name(path: Path, model: Path) -> str:
    return os.path.relpath(path, model).replace(os.sep, "/")


def _key(path: Path, sums: str) -> tuple[str, ...]:
    stat = path.stat()
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return (os.path.realpath(path), sums, *map(str, state))
