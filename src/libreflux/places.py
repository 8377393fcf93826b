"""Where a user wants something written: tried before the work starts, and named when a write fails."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path

from libreflux.errors import RunError

WRITE_ERRORS = frozenset({errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS})
"""What only a write meets."""
PLACE_ERRORS = WRITE_ERRORS | frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
    }
)
"""What the file system says of a place that the user named; any other OSError is a bug of ours."""
_HINT = "make room or rights there, or name another place"


@contextlib.contextmanager
def placed(path: Path, errors: Collection[int] = PLACE_ERRORS) -> Iterator[None]:
    """Says of a failed write what it was to become; the system names no file when a disk is full.

    Args:
        path: what the block writes.
        errors: the error numbers that are the place's fault, not ours.

    Raises:
        RunError: one of them in the block.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in errors:
            raise
        raise RunError(os.strerror(number), where=path, hint=_HINT) from error


def nearest(path: Path) -> Path | None:
    """What is there and may be meant by a path that is not: the nearest name in the folder where the path ends."""
    path, rest = Path(path), list[str]()
    if os.path.lexists(path):
        return None
    with contextlib.suppress(OSError, ValueError):
        while not os.path.lexists(path.parent) and path.name:
            path, rest = path.parent, [path.name, *rest]
        names = {name.casefold(): name for name in sorted(os.listdir(path.parent)) if not name.startswith(".")}
        if found := difflib.get_close_matches(path.name.casefold(), names, n=1, cutoff=0.7):
            near = path.with_name(names[found[0]])
            while rest and os.path.lexists(near / rest[0]):
                near /= rest.pop(0)
            return near
    return None


def did_you_mean(path: Path, otherwise: str = "check the path") -> str:
    """The hint for a path that is not there: the nearest one that is, or `otherwise`."""
    near = nearest(path)
    return otherwise if near is None else f"did you mean {near}?"


def new_place(path: Path) -> None:
    """Raises RunError unless `path` is free and can be written: it is to be made there by one rename."""
    path = Path(path)
    if os.path.lexists(path):
        raise RunError("already exists", where=path, hint="choose another name or remove it")
    _try(path)


def file_place(path: Path) -> None:
    """Raises RunError unless a file can be written, or replaced, at `path`."""
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir it never raises
        raise RunError("is a folder", where=path, hint="name another file, or remove it")
    _try(path)


def folder_place(path: Path, *parts: str) -> None:
    """Raises RunError unless files can be written in the folder `path`, and in these of its sub-folders.

    What is not there yet must be possible to make.
    """
    for folder in (Path(path), *(Path(path) / part for part in parts)):
        if os.path.lexists(folder) and not os.path.isdir(folder):
            what = (
                "is a link that leads nowhere" if os.path.islink(folder) and not os.path.exists(folder) else "is a file"
            )
            raise RunError(what, where=folder, hint="name a folder, or remove it")
        _try(folder / "file")


def _try(path: Path) -> None:
    """Writes an empty file where `path`, or the first folder that it needs, is to be, and removes it again.

    No folder is made: another process might begin to use it while this one takes it away again.
    """
    with placed(path):
        above = path.absolute().parent
        while not os.path.lexists(above) and above != above.parent:  # a drive of Windows may not be there
            above = above.parent
        if not os.path.isdir(above):
            raise RunError(_in_the_way(above), where=above, hint="name another place")
        _check_lengths(path, above)
        trial = above / f".trial.tmp-{secrets.token_hex(4)}"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()


def _in_the_way(path: Path) -> str:
    dangling = os.path.islink(path) and not os.path.exists(path)
    return "is a link that leads nowhere" if dangling else "is a file, not a folder"


def _check_lengths(path: Path, above: Path) -> None:
    """OSError (ENAMETOOLONG) for a name that this file system does not take, the longest on its way included."""
    missing = path.absolute().parent.relative_to(above).parts
    for name in (*missing, f".{path.name}.staging-{'0' * 8}"):
        with contextlib.suppress(FileNotFoundError):
            os.lstat(above / name)


def _error_number(error: BaseException) -> int:
    """The errno behind an exception, safetensors' and an inner `placed`'s included; 0 if there is none."""
    if isinstance(error, RunError) and error.__cause__ is not None:
        return _error_number(error.__cause__)
    if isinstance(error, OSError):
        return error.errno or 0
    from_rust = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(from_rust[1]) if from_rust else 0
