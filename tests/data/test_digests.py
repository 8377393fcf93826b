from __future__ import annotations

import dataclasses
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from libreflux import files
from libreflux.data import digests
from libreflux.data.digests import MEMORY, FileMemory
from libreflux.data.pictures import Inspected
from libreflux.data.progress import ProgressCount


def pictures(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number} %20?#.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8 + number, 8)).save(path)
    paths[3].write_bytes(b"no picture")
    return paths


def test_files_are_read_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pictures(tmp_path / "pictures?#")
    monkeypatch.setattr(digests, "AT_ONCE", 2)
    told: list[tuple[int, int, str]] = []
    memory = FileMemory(tmp_path / "cache?#")
    first = list(memory.inspect(paths, ProgressCount(lambda *now: told.append(now))))
    memory.save()
    assert [found.digest for found in first] == [files.sha256_file(path) for path in paths]
    assert [(found.width, bool(found.fault)) for found in first] == [
        (8, False),
        (9, False),
        (10, False),
        (0, True),
        (12, False),
    ]
    assert [(done, total) for done, total, _ in told] == [(number, 5) for number in range(1, 6)]

    read: list[Path] = []
    real = digests.inspect

    def inspect(path: Path) -> Inspected:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests, "inspect", inspect)
    told.clear()
    bar = ProgressCount(lambda *now: told.append(now))
    assert list(FileMemory(tmp_path / "cache?#").inspect(paths, bar)) == first
    assert (read, told) == ([], [])
    assert list(FileMemory(tmp_path / "new", [tmp_path / "cache?#"]).inspect(paths, bar)) == first
    assert read == []
    Image.new("RGB", (20, 20)).save(paths[3])
    again = list(FileMemory(tmp_path / "cache?#").inspect(paths, bar))
    assert read == [paths[3]]
    assert again[3].width == 20


def test_a_damaged_memory_is_forgotten(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MEMORY).write_bytes(b"not a database, not at all, by no means" * 100)
    memory = FileMemory(tmp_path / "cache")
    assert memory.sha256(paths[0]) == files.sha256_file(paths[0])
    memory.save()
    assert FileMemory(tmp_path / "cache").sha256(paths[0]) == files.sha256_file(paths[0])


def one_colour(path: Path, colour: str) -> Path:
    """Of one size in bytes whatever the colour; modified in the year 2001."""
    Image.new("RGB", (8, 8), colour).save(path)
    os.utime(path, ns=(10**18, 10**18))
    return path


def written_over(old: Path, new: Path) -> None:
    old.write_bytes(new.read_bytes())
    os.utime(old, ns=(10**18, 10**18))


def unpacked(old: Path, new: Path) -> None:
    archive = old.with_suffix(".tar")
    with tarfile.open(archive, "w") as packed:
        packed.add(new, old.name)
    with tarfile.open(archive) as packed:
        packed.extractall(old.parent, filter="tar")


def swapped(old: Path, new: Path) -> None:
    for source, target in ((old, "c.bmp"), (new, old.name), (old.with_name("c.bmp"), new.name)):
        source.rename(old.with_name(target))


def seen(folder: Path, *paths: Path) -> list[str]:
    """Digests of pictures as a memory of this folder has them, saved."""
    memory = FileMemory(folder)
    found = [one.digest for one in memory.inspect(paths, ProgressCount())]
    memory.save()
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names of the files that are decoded, and of those that are hashed alone, from here on."""
    names: dict[str, list[str]] = {"decoded": [], "hashed": []}
    inspected, hashed = digests.inspect, files.sha256_file

    def inspect(path: Path) -> Inspected:
        names["decoded"].append(path.name)
        return inspected(path)

    def sha256_file(path: Path) -> str:
        names["hashed"].append(path.name)
        return hashed(path)

    monkeypatch.setattr(digests, "inspect", inspect)
    monkeypatch.setattr(files, "sha256_file", sha256_file)
    return names


@pytest.mark.parametrize("replace", [written_over, os.replace, shutil.copy2, unpacked, swapped])
def test_a_file_replaced_by_one_of_its_size_and_time_is_read_again(
    tmp_path: Path, replace: Callable[[Path, Path], object]
) -> None:
    old, new = one_colour(tmp_path / "a.bmp", "red"), one_colour(tmp_path / "b.bmp", "blue")
    red, blue = files.sha256_file(old), files.sha256_file(new)
    cache = tmp_path / "cache"
    assert seen(cache, old) == [red]
    assert FileMemory(cache).sha256(old) == red
    before = old.stat()
    replace(*((new, old) if replace in (os.replace, shutil.copy2) else (old, new)))
    assert (old.stat().st_size, old.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert FileMemory(cache).sha256(old) == blue
    assert seen(cache, old) == [blue] == seen(cache, old)


def test_files_that_swap_names_within_a_tick_differ_in_their_inode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, states = one_colour(tmp_path / "a.bmp", "red"), digests.file_state
    monkeypatch.setattr(
        digests, "file_state", lambda path: ("a", dataclasses.replace(states(path)[1], ctime=1, inode=7))
    )
    [red] = seen(tmp_path / "cache", path)
    one_colour(path, "blue")
    for inode, same in ((7, True), (0, True), (8, False)):  # 0: a file system that has none
        change = {"ctime": 1, "inode": inode}
        monkeypatch.setattr(
            digests, "file_state", lambda path, to=change: ("a", dataclasses.replace(states(path)[1], **to))
        )
        assert (FileMemory(tmp_path / "cache").sha256(path) == red) is same


def test_new_rights_or_a_new_place_cost_a_reading_and_no_decoding(tmp_path: Path, read: dict[str, list[str]]) -> None:
    paths = [one_colour(tmp_path / f"{name}.bmp", name) for name in ("red", "blue")]
    first = seen(tmp_path / "cache", *paths)
    for names in read.values():
        names.clear()
    assert seen(tmp_path / "cache", *paths) == first
    assert read == {"decoded": [], "hashed": []}
    paths[0].chmod(0o600)
    assert seen(tmp_path / "cache", *paths) == first == seen(tmp_path / "cache", *paths)
    assert read == {"decoded": [], "hashed": ["red.bmp"]}


def old_memory(folder: Path, *paths: Path) -> None:
    """A memory as the first version wrote it: without change times, inodes and rules."""
    folder.mkdir()
    table = (
        "CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, digest TEXT, width INTEGER, "
        "height INTEGER, fault TEXT) WITHOUT ROWID"
    )
    with closing(sqlite3.connect(folder / MEMORY)) as index, index:
        index.execute(table)
        for path in paths:
            stat = path.stat()
            row = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, files.sha256_file(path), 8, 8, "")
            index.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    later = max(path.stat().st_ctime_ns for path in paths) + 10**6  # whatever the clock's tick is
    os.utime(folder / MEMORY, ns=(later, later))


def test_a_memory_of_an_older_version_is_kept(tmp_path: Path, read: dict[str, list[str]]) -> None:
    red, blue, grey = (one_colour(tmp_path / name, name[:-4]) for name in ("red.bmp", "blue.bmp", "grey.tif"))
    cache = tmp_path / "cache"
    old_memory(cache, red, blue, grey)
    known = [files.sha256_file(path) for path in (red, blue, grey)]
    read["hashed"].clear()
    before = (cache / MEMORY).read_bytes()
    assert seen(cache, red, blue) == known[:2]
    assert read == {"decoded": [], "hashed": []}
    assert (cache / MEMORY).read_bytes() == before  # nothing to write, so a shared cache may be read-only
    assert seen(cache, grey) == known[2:]  # some TIFFs are refused since: it is looked at, and the table widened
    assert read["decoded"] == ["grey.tif"]
    assert seen(cache, red, blue, grey) == known
    assert read["decoded"] == ["grey.tif"]
    written_over(blue, red)
    assert seen(cache, red, blue, grey) == [known[0], known[0], known[2]]
    assert read["decoded"] == ["grey.tif", "blue.bmp"]


def test_what_is_damaged_inside_a_memory_is_read_again_and_written(tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures")
    cache = tmp_path / "cache"
    memory = FileMemory(cache)
    first = list(memory.inspect(paths, ProgressCount()))
    memory.save()
    memory = FileMemory(cache)
    data = (cache / MEMORY).read_bytes()
    (cache / MEMORY).write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    for again in (memory, FileMemory(cache), FileMemory(cache)):
        assert list(again.inspect(paths, ProgressCount())) == first
        again.save()
