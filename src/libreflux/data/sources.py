"""Ordinary folders of captioned pictures, in the spellings that people use.

Side-car: ``name.txt`` or ``name.caption`` beside ``name.jpg``, one caption per line (kohya). ``metadata.jsonl``: one
JSON object per line with ``file_name`` and a caption column (Hugging Face imagefolder), which holds a text, a list of
texts, or texts by name (``{"short": …, "long": …}``). A picture may have both; a caption said twice counts once. A
sub-folder named ``10_cat`` (kohya) shows its pictures ten times an epoch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from libreflux import plainjson
from libreflux.data.folders import CAPTIONS, METADATA, Folder, alike, walk
from libreflux.data.pictures import FORMATS, Inspected, inspect
from libreflux.errors import DataError
from libreflux.places import did_you_mean
from libreflux.printing import counted, get_logger
from libreflux.recipe import DataSource

logger = get_logger(__name__)

COLUMNS = ("text", "texts", "prompt", "prompts", "caption", "captions", "description")
MEND_CAPTION = "write a .txt of the same name beside it, one caption per line, or a line in metadata.jsonl"
_KOHYA = re.compile(r"([1-9]\d{0,2})_(.+)")  # up to 999: 2023_summer is a year's folder

Inspect = Callable[[Sequence[Path]], Iterable[Inspected]]
Part = tuple[int, int]
"""(i, n): the i-th of n parts, from 0; which part a picture is in follows from its name below its source's folder."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture and what may be said of it. Of a million each byte counts: no `Path`, which takes 350 of them.

    Attributes:
        id: first 32 hexadecimal digits of the SHA-256 of the file's bytes: the same picture is the same sample.
        file: path of the first file that holds it.
        captions: at least one, distinct, in reading order, the source's prefix included.
        kinds: each caption's name in ``metadata.jsonl``, "" for those without.
        repeats: of its kohya folder, else 1.
        size: upright (width, height) in pixels.
    """

    id: str
    file: str
    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    repeats: int = 1
    size: tuple[int, int] = (0, 0)

    @property
    def path(self) -> Path:
        """`file` as a path."""
        return Path(self.file)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A picture that is not used, and why; `too_small`: because the source's ``min_size`` leaves it out."""

    id: str
    path: Path
    reason: str
    too_small: bool = False


@dataclass(frozen=True)
class SourceRead:
    """A source's folder, read.

    Attributes:
        samples: usable pictures, sorted by id.
        quarantined: the others.
        origins: captions by where they stand: a suffix such as ".txt", a column of metadata.jsonl, or "folder name".
        repeats: kohya folders and their numbers.
        folder: all that lies there.
    """

    samples: list[Sample]
    quarantined: list[Quarantined]
    origins: dict[str, int]
    repeats: dict[str, int]
    folder: Folder


def inspect_all(paths: Sequence[Path]) -> Iterator[Inspected]:
    """What each picture file is."""
    return map(inspect, paths)


def read_source(
    source: DataSource, inspected: Inspect = inspect_all, part: Part = (0, 1)
) -> tuple[list[Sample], list[Quarantined]]:
    """`samples` and `quarantined` of :func:`read`."""
    found = read(source, inspected, part)
    return found.samples, found.quarantined


def read(source: DataSource, inspected: Inspect = inspect_all, part: Part = (0, 1)) -> SourceRead:
    """The captioned pictures of a folder and its sub-folders; what is hidden, or written by a run, is left out.

    Args:
        source: its path, prefix, folder_captions and min_size are used.
        inspected: what each picture file is, for callers that remember it.
        part: read only this part of the pictures.

    Raises:
        DataError: no such folder, no picture in it, a picture without a caption, a listed file that is missing, or a
            format that is not read; the first of them, named.
    """
    folder = Path(os.path.normpath(Path(source.path).expanduser()))
    require_folder(folder)
    found = walk(folder)
    if not found.pictures:
        raise DataError("no picture in this folder", where=folder, hint="check the path")
    listed = read_lists(found.lists)
    for stray in sorted(listed.keys() - set(found.pictures)):
        hint = "list files of this folder that are not hidden"
        raise DataError(f"listed in {METADATA} but not read from {folder}", where=stray, hint=hint)
    pictures = [picture for picture in found.pictures if in_part(picture.relative_to(folder), part)]
    once: dict[tuple[Any, ...], Any] = {}  # few pictures have kinds or sizes of their own
    standing: list[tuple[tuple[str, int], ...]] = []
    captioned = []
    for picture in pictures:
        sidecars, rows = found.sidecars.get(picture, ()), listed.pop(picture, [])
        own: dict[str, int] = {}
        captioned.append(_columns(_captions(picture, folder, source, rows, sidecars, own), once))
        standing.append(once.setdefault(tuple(own.items()), tuple(own.items())))
    samples, quarantined = _merge(folder, source, pictures, captioned, inspected(pictures), once)
    unused = {one.path for one in quarantined}
    origins: dict[str, int] = {}
    for picture, told in zip(pictures, standing, strict=True):
        for where, count in told if picture not in unused else ():
            origins[where] = origins.get(where, 0) + count
    repeats = {kohya.folder: kohya.repeats for kohya in (_kohya(Path(one.file), folder) for one in samples)}
    repeats.pop("", None)
    _tell_unread(folder, found)
    return SourceRead(samples, quarantined, origins, dict(sorted(repeats.items())), found)


def _merge(
    folder: Path,
    source: DataSource,
    pictures: Sequence[Path],
    captioned: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    inspected: Iterable[Inspected],
    once: dict[tuple[Any, ...], Any],
) -> tuple[list[Sample], list[Quarantined]]:
    """Samples sorted by id, each picture once with all its captions, and what cannot be one."""
    merged: dict[str, Sample] = {}
    quarantined = []
    for picture, (captions, kinds), found in zip(pictures, captioned, inspected, strict=True):
        name, size = found.digest[:32], (found.width, found.height)
        if reason := found.fault or _too_small(size, source.min_size):
            quarantined.append(Quarantined(name, picture, reason, too_small=not found.fault))
            continue
        repeats = _kohya(picture, folder).repeats
        file = str(picture)
        if known := merged.get(name):
            both = dict(zip(captions, kinds, strict=True)) | dict(zip(known.captions, known.kinds, strict=True))
            captions, kinds = _columns({caption: both[caption] for caption in (*known.captions, *captions)}, once)
            file, repeats = known.file, max(known.repeats, repeats)
        merged[name] = Sample(name, file, captions, kinds, repeats, once.setdefault(size, size))
    return [sample for _, sample in sorted(merged.items())], quarantined


def require_folder(folder: Path) -> None:
    """Raises DataError unless pictures can be looked for there."""
    try:
        if folder.is_dir():
            return
        there = folder.exists()
    except PermissionError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=folder, hint="make it readable") from None
    if there:
        hint = "unpack it, or name the folder that it lies in"
        raise DataError("this is a file, and data.path names a folder", where=folder, hint=hint)
    near = alike(folder)
    hint = f"write {near[0]} if that is meant" if near else did_you_mean(folder)
    raise DataError("no such folder", where=folder, hint=hint)


def _tell_unread(folder: Path, found: Folder) -> None:
    for unread in found.unread.values():
        if unread.beside:
            logger.warning(
                "%s: not read, though beside pictures or captions of the same names: %s, the first: %s",
                folder,
                counted(unread.beside, f"{unread.suffix} file" if unread.suffix else "file")
                + ("" if unread.suffix else " without a suffix"),
                unread.first.relative_to(folder),
            )


def _columns(captions: dict[str, str], once: dict[tuple[Any, ...], Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(captions, kinds), the kinds shared between pictures."""
    kinds = tuple(captions.values())
    return tuple(captions), once.setdefault(kinds, kinds)


def in_part(name: Path, part: Part) -> bool:
    """Whether a picture, by its path below its source's folder, is in a part."""
    if part[1] == 1:
        return True
    digest = hashlib.blake2b(name.as_posix().encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % part[1] == part[0]


def _too_small(size: tuple[int, int], least: int) -> str:
    return f"too small: {size[0]} x {size[1]} pixels, min_size is {least}" if min(size) < least else ""


class _Kohya(NamedTuple):
    """A folder called 10_cat: its name, its number and what it shows."""

    folder: str = ""
    repeats: int = 1
    shown: str = ""


def _kohya(picture: Path, folder: Path) -> _Kohya:
    """A picture's kohya folder, which is the source's folder or one in it."""
    below = picture.relative_to(folder).parts[:-1]
    for name in (*below[:1], folder.name):
        if match := _KOHYA.fullmatch(name):
            return _Kohya(name, int(match[1]), match[2].replace("_", " ").strip())
    return _Kohya()


def _captions(
    picture: Path,
    folder: Path,
    source: DataSource,
    listed: Sequence[_Listed],
    sidecars: Sequence[Path],
    origins: dict[str, int],
) -> dict[str, str]:
    """Caption → kind of a picture, with the source's prefix; counts where they stand."""
    found: dict[str, str] = {}
    for caption, kind, column in listed:
        found.setdefault(caption, kind)
        origins[column] = origins.get(column, 0) + 1
    usual = picture.with_suffix(CAPTIONS[0])
    for path in (*([usual] if usual.is_file() else ()), *sidecars):
        for caption in read_sidecar(path):
            found.setdefault(caption, "")
            origins[path.suffix.lower()] = origins.get(path.suffix.lower(), 0) + 1
    if not found and source.folder_captions and (name := _kohya(picture, folder).shown):
        found = {name: ""}
        origins["folder name"] = origins.get("folder name", 0) + 1
    if not found:
        meant = [path for path in (*alike(usual), *alike(picture)) if path.suffix.lower() not in FORMATS]
        hint = f"{meant[0]} is not read: {MEND_CAPTION}" if meant else MEND_CAPTION
        raise DataError("this picture has no caption", where=picture, hint=hint)
    return {source.prefix + caption: kind for caption, kind in found.items()}


def read_sidecar(path: Path) -> list[str]:
    """The captions of a side-car, at least one."""
    captions = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not captions:
        raise DataError("this caption file is empty", where=path, hint="write one caption per line")
    return captions


class _Listed(NamedTuple):
    """A caption of metadata.jsonl."""

    caption: str
    kind: str
    column: str


def read_lists(paths: Sequence[Path]) -> dict[Path, list[_Listed]]:
    """The captions of each picture listed in these metadata.jsonl files."""
    listed: dict[Path, list[_Listed]] = {}
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            picture, captions = _read_row(path.parent, line, f"{path}, line {number}")
            listed.setdefault(picture, []).extend(captions)
    return listed


def _read_row(folder: Path, line: str, where: str) -> tuple[Path, list[_Listed]]:
    try:
        row = plainjson.parse(line)
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})", where=where, hint="write one JSON object per line") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError("no file_name in this line", where=where, hint='write {"file_name": "a.png", "text": "…"}')
    picture = Path(os.path.normpath(folder / row["file_name"]))
    if not picture.is_file():
        meant = [path for path in alike(picture) if path.suffix.lower() in FORMATS]
        hint = f"write {meant[0].name} if that is meant" if meant else "put it back or remove the line"
        raise DataError(f"listed file {row['file_name']!r} is missing", where=where, hint=hint)
    if picture.suffix.lower() not in FORMATS:
        raise DataError(f"listed file {row['file_name']!r} is no picture of a format that is read", where=where)
    captions = [
        _Listed(caption, kind, column)
        for column in COLUMNS
        if column in row
        for caption, kind in spread_captions(row[column], f"{where}: {column}")
    ]
    if not captions:
        raise DataError("no caption in this line", where=where, hint=f"add one of {', '.join(COLUMNS)}")
    return picture, captions


def spread_captions(value: object, where: str) -> list[tuple[str, str]]:
    """(caption, kind) pairs of a caption column."""
    pairs: list[tuple[object, str]]
    if isinstance(value, dict):
        pairs = [
            (text, str(kind)) for kind, texts in value.items() for text, _ in spread_captions(texts, f"{where}.{kind}")
        ]
    else:
        pairs = [(text, "") for text in (value if isinstance(value, list) else [value])]
    found = []
    for text, kind in pairs:
        if not isinstance(text, str) or not text.strip():
            hint = "write a text, a list of texts, or texts by name"
            raise DataError(f"{text!r} is no caption", where=where, hint=hint)
        found.append((" ".join(text.split()), kind))
    return found


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without its mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=path, hint="make it readable, or remove it"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"cannot be read as UTF-8 ({error})", where=path, hint="save it as UTF-8") from None
