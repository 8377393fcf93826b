"""Where a result is to be: refused before the work, and nothing is left of the trial."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from libreflux import files, locks
from libreflux.errors import RunError
from libreflux.places import file_place, folder_place, new_place
from rights import bound_by_modes

KINDS: dict[str, Callable[[Path], object]] = {"new": new_place, "file": file_place, "folder": folder_place}


def everything(folder: Path) -> list[tuple[Path, int, bytes]]:
    """All below a folder, with its mode and content."""
    found = []
    for path in sorted(folder.rglob("*")):
        held = path.read_bytes() if path.is_file() else b""
        found.append((path, path.lstat().st_mode, held))
    return found


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "file").write_text("x")
    (tmp_path / "locked").chmod(0o555)
    return tmp_path


BAD = [
    ("new", "file", "already exists"),
    ("new", "folder", "already exists"),
    ("new", "dangling", "already exists"),
    ("file", "folder", "is a folder"),
    ("folder", "file", "is a file"),
    ("folder", "dangling", "is a link that leads nowhere"),
    *((kind, "locked/x", "Permission denied") for kind in KINDS),
    *((kind, "locked/a/b/c", "Permission denied") for kind in KINDS),
    ("file", "locked/file", "Permission denied"),
    ("folder", "locked", "Permission denied"),
    *((kind, "file/x", "is a file, not a folder") for kind in KINDS),
    *((kind, "dangling/x", "is a link that leads nowhere") for kind in KINDS),
    *((kind, "x" * 300, "File name too long") for kind in KINDS),
    *((kind, "a/" + "x" * 300 + "/b", "File name too long") for kind in KINDS),
    ("new", "x" * 240, "File name too long"),  # with what is added to it on its way
]


@pytest.mark.parametrize(("kind", "name", "told"), BAD)
def test_a_place_that_cannot_be_written_is_refused(room: Path, kind: str, name: str, told: str) -> None:
    before = everything(room)
    with bound_by_modes(), pytest.raises(RunError, match=told) as refused:
        KINDS[kind](room / name)
    assert "; hint: " in str(refused.value)
    assert everything(room) == before


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in KINDS for name in ("x", "a/b/c", "folder/x")),
        ("file", "file"),
        ("file", "dangling"),
        ("folder", "folder"),
        ("folder", "."),
    ],
)
def test_a_place_that_can_be_written_is_left_as_it_was(room: Path, kind: str, name: str) -> None:
    before = everything(room)
    with bound_by_modes():
        KINDS[kind](room / name)
    assert everything(room) == before


def test_the_sub_folders_of_a_folder_are_tried_too(room: Path) -> None:
    (room / "folder" / "cells").mkdir(mode=0o555)
    with bound_by_modes():
        folder_place(room / "folder")
        with pytest.raises(RunError, match=r"cells.*Permission denied"):
            folder_place(room / "folder", "other", "cells")


NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_disk_without_locks_and_syncs_of_folders_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    real = os.fsync

    def no_lock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def files_alone(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            no_lock()
        real(handle)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    if number != errno.ENOLCK:
        monkeypatch.setattr(os, "fsync", files_alone)
    for cached in (locks.warn_unlocked, files.warn_unsynced):
        cached.cache_clear()
    for name in ("one", "two"):
        with files.lock(tmp_path / "run"), files.staged_dir(tmp_path / "run" / name) as staging:
            files.atomic_write_text(staging / "a", name)
        assert (tmp_path / "run" / name / "a").read_text() == name
    told = [record.getMessage() for record in caplog.records]
    assert sum("has no locks" in line and "no second process" in line for line in told) == 1
    assert sum("does not sync folders" in line for line in told) == (number != errno.ENOLCK)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINVAL])
def test_a_file_that_cannot_be_synced_is_not_taken_for_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a").write_text("old")

    def broken(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises((OSError, RunError)):
        files.atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
