"""Locks: a folder, or a file, held by one process; the system frees them when the holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from libreflux.errors import RunError
from libreflux.places import placed
from libreflux.printing import get_logger

logger = get_logger(__name__)

LOCK = ".lock"
_UNREADABLE = 1 if sys.platform == "win32" else 0
"""Bytes at the start of a locked file that others cannot read: on Windows the one that is locked."""
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF})
"""What network file systems (NFS, CIFS, FUSE) say of what they do not have."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds ``folder`` (created if need be) for one process; the system frees it when the holder ends, however it ends.

    Raises:
        RunError: somebody else holds it; their process id is named.
    """
    path, handle = folder / LOCK, _lock_handle(folder)
    try:
        with placed(path):
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, b"\n" * _UNREADABLE + f"{os.getpid()}\n".encode())
        # The file stays when the lock goes: removing it would let two processes lock two files of one name.
        yield
    finally:
        os.close(handle)


def _lock_handle(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not take(handle, folder):
                os.lseek(handle, _UNREADABLE, os.SEEK_SET)
                holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
                hint = "wait for it, stop it, or choose another folder"
                raise RunError(f"in use by process {holder}", where=folder, hint=hint)
            # Its last holder may have removed the whole folder since it was opened: then this locks nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def take(handle: int, folder: Path) -> bool:
    """Whether the lock of an open file is ours now; True with a warning where the file system has no locks."""
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn_unlocked(str(folder), os.strerror(error.errno))
        return True


@functools.cache  # a run locks its folder more than once
def warn_unlocked(folder: str, why: str) -> None:
    """Once a process and folder: that nothing keeps a second process out of it."""
    logger.warning("%s: its file system has no locks (%s): let no second process write there", folder, why)
