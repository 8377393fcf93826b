from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from libreflux import files
from libreflux.data import digests
from libreflux.data.bar import Bar
from libreflux.data.digests import MEMORY, FileMemory


def pictures(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number} %20?#.png" for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8 + number, 8)).save(path)
    paths[3].write_bytes(b"no picture")
    return paths


def test_files_are_read_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pictures(tmp_path / "pictures?#")
    monkeypatch.setattr(digests, "_AT_ONCE", 2)
    told: list[tuple[int, int, str]] = []
    memory = FileMemory(tmp_path / "cache?#")
    first = list(memory.inspect(paths, Bar(lambda *now: told.append(now))))
    memory.save()
    assert [found.digest for found in first] == [files.sha256_file(path) for path in paths]
    assert [(found.width, bool(found.fault)) for found in first] == [
        (8, False), (9, False), (10, False), (0, True), (12, False),
    ]  # fmt: skip
    assert [(done, total) for done, total, _ in told] == [(number, 5) for number in range(1, 6)]

    read: list[Path] = []
    real = digests.inspect
    monkeypatch.setattr(digests, "inspect", lambda path: (read.append(path), real(path))[1])
    told.clear()
    bar = Bar(lambda *now: told.append(now))
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
