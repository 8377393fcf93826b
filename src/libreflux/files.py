"""Every byte that must survive a power cut or a SIGKILL: atomic writes, staged folders, manifests; locks are `locks`.

The rule is always the same: write beside the target, fsync the bytes, rename once, fsync the folder. A reader sees
the old state or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import lock_descriptor

from libreflux import plainjson
from libreflux.errors import RunError
from libreflux.locks import LOCK as LOCK
from libreflux.locks import lock as lock
from libreflux.locks import take
from libreflux.places import WRITE_ERRORS, placed
from libreflux.printing import get_logger

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

MANIFEST = "manifest.json"
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
"""What network file systems (NFS, CIFS, FUSE) say of what they do not have."""
# The last one is safetensors' own.
_LEFT = re.compile(r"\..+\.(tmp|staging)-[0-9a-f]{8}(\.lock)?|\.deleted-.+|\.tmp\w{6}")
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data`` in one rename; the parent folder is created."""

    def fill(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_whole(path, fill)


def atomic_write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by ``value`` as indented JSON; NaN and infinities are a ValueError, they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces ``path`` by a safetensors file; tensors are detached, made contiguous and moved to the CPU first.

    Equal contents give equal bytes.
    """
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def fill(temporary: Path) -> None:
        save_file(ready, temporary, metadata=dict(metadata) if metadata else None)
        _sort_metadata(temporary)
        _open_to_others(temporary)

    replace_whole(path, fill)


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file into sorted order, in place, so that equal contents are equal bytes.

    safetensors 0.8 writes them in the order of a randomly seeded hash map, another one in every process.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(raw) > size:
            raise ValueError(f"{path}: the header grew from {size} to {len(raw)} bytes")
        file.seek(8)
        file.write(raw.ljust(size))


@contextlib.contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``final``; when the block ends well it is synced and renamed to ``final``.

    An exception in the block removes it. What a killed process left behind is removed by the next ``staged_dir`` of
    the same target: a live one holds the lock of its folder, a file beside it; a dead one cannot.

    Raises:
        RunError: ``final`` exists, or the disk is full or refuses otherwise.
    """
    final = Path(final)
    _refuse_existing(final)
    with placed(final, WRITE_ERRORS), _staged(final) as staging:
        yield staging


@contextlib.contextmanager
def _staged(final: Path) -> Iterator[Path]:
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep_abandoned(final)
    staging = final.parent / f".{final.name}.staging-{secrets.token_hex(4)}"
    locked = _lock_of(staging)
    holder = os.open(locked, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not take(holder, staging.parent):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), locked)
        staging.mkdir()
        yield staging
        _open_to_others(*(path for path in staging.rglob("*") if path.is_file() and not path.is_symlink()))
        _sync_tree(staging)
        _refuse_existing(final)
        os.rename(staging, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(holder)
        locked.unlink(missing_ok=True)


def _lock_of(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}.lock")


def remove_folder(folder: Path) -> None:
    """Renames a folder away before its files go: a killed process leaves the whole of it, or what `sweep` removes."""
    gone = folder.with_name(f".deleted-{folder.name}")
    if gone.exists():
        shutil.rmtree(gone)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Removes what killed processes left directly in a folder: temporary files, stages, half-done deletions.

    Call it where no other process can be writing.
    """
    for path in list(folder.glob(".*")):
        if not _LEFT.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Lists every file below ``folder`` with its size and SHA-256 in ``manifest.json``; call it last."""
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    atomic_write_json(folder / MANIFEST, {"schema": 1, "files": listed})


def verify_manifest(folder: Path) -> None:
    """Checks every listed file's size and SHA-256; files that the manifest does not list are left alone.

    Raises:
        RunError: no manifest, an unreadable one, or a file that is missing or differs, named.
    """
    hint = "remove this folder and use an older one"
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("cut short")
        manifest = plainjson.parse(text)
        listed = {str(name): (int(row["size"]), str(row["sha256"])) for name, row in manifest["files"].items()}
    except FileNotFoundError:
        raise RunError("incomplete: it has no manifest", where=folder, hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"unreadable manifest ({error})", where=path, hint=hint) from None
    if manifest.get("schema") != 1:
        raise RunError(f"manifest schema {manifest.get('schema')!r} is not 1", where=path, hint="update libreflux")
    for name, (size, digest) in listed.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise RunError(f"names {name!r}, which is outside its folder", where=path, hint=hint)
        if not file.is_file():
            raise RunError("listed in the manifest but missing", where=file, hint=hint)
        if file.stat().st_size != size:
            raise RunError(f"damaged: {file.stat().st_size} bytes instead of {size}", where=file, hint=hint)
        if sha256_file(file) != digest:
            raise RunError("damaged: its SHA-256 is not the manifest's", where=file, hint=hint)


def replace_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Replaces ``path`` in one rename by the file that ``fill`` makes at the path it is given."""
    path = Path(path)
    with placed(path):
        _replace_anywhere(path, fill)


def _replace_anywhere(path: Path, fill: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(4)}"
    try:
        fill(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _open_to_others(*paths: Path) -> None:
    """Gives files the mode that the umask gives: safetensors makes them readable by their owner alone."""
    for path in paths:
        path.chmod(0o666 & ~_UMASK)


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise RunError("already exists", where=final, hint="choose another name or remove it")


def _sweep_abandoned(final: Path) -> None:
    """Removes stages of this target whose process is dead: no lock, or one that can be taken."""
    for leftover in final.parent.glob(f".{final.name}.staging-*"):
        if leftover.suffix == ".lock":
            continue
        locked = _lock_of(leftover)
        try:
            handle = os.open(locked, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            continue
        try:
            dead = lock_descriptor(handle, blocking=False)
        except OSError:
            dead = False  # no locks here: perhaps alive
        finally:
            os.close(handle)
        if dead:
            shutil.rmtree(leftover, ignore_errors=True)
            locked.unlink(missing_ok=True)


@functools.cache  # once for each file system
def warn_unsynced(device: int) -> None:
    """Once a process and file system, `os.stat().st_dev`: that a power cut may undo the newest files."""
    told = "a file system (device %d:%d) does not sync folders: a power cut may undo the newest files, none by half"
    logger.warning(told, *device_numbers(device))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def device_numbers(device: int) -> tuple[int, int]:
    """(major, minor) of `os.stat().st_dev`; major 0 is a file system without a disk of its own. Windows has no such."""
    if sys.platform == "win32":
        return 1, device
    return os.major(device), os.minor(device)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # it opens no folder
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Of a file an fsync that fails means lost bytes; of a folder only that its newest names may be.
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
        warn_unsynced(os.fstat(handle).st_dev)
    finally:
        os.close(handle)
