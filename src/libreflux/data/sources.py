"""Ordinary folders of captioned pictures, in the spellings that people use.

Side-car: ``name.txt`` beside ``name.jpg``, one caption per line (kohya). ``metadata.jsonl``: one JSON object per line
with ``file_name`` and a caption column (Hugging Face imagefolder), which holds a text, a list of texts, or texts by
name (``{"short": …, "long": …}``). A picture may have both; a caption said twice counts once. A sub-folder named
``10_cat`` (kohya) shows its pictures ten times an epoch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.data.pictures import FORMATS, Inspected, inspect
from libreflux.errors import DataError
from libreflux.printing import get_logger
from libreflux.recipe import DataSource

logger = get_logger(__name__)

OTHER_PICTURES = frozenset({".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd"})
OTHER_LISTS = ("metadata.csv", "metadata.parquet")
COLUMNS = ("text", "texts", "prompt", "prompts", "caption", "captions", "description")
METADATA = "metadata.jsonl"
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
    """A picture that cannot be used, and why."""

    id: str
    path: Path
    reason: str


def inspect_all(paths: Sequence[Path]) -> Iterator[Inspected]:
    """What each picture file is."""
    return map(inspect, paths)


def read_source(
    source: DataSource, inspected: Inspect = inspect_all, part: Part = (0, 1)
) -> tuple[list[Sample], list[Quarantined]]:
    """The captioned pictures of a folder and its sub-folders, sorted by id; what is hidden is left out.

    Args:
        source: its path, prefix, folder_captions and min_size are used.
        inspected: what each picture file is, for callers that remember it.
        part: read only this part of the pictures.

    Raises:
        DataError: no such folder, no picture in it, a picture without a caption, a listed file that is missing, or a
            format that is not read; the first of them, named.
    """
    folder = Path(os.path.normpath(Path(source.path).expanduser()))
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, mend="check the path")
    pictures, lists = _walk(folder)
    if not pictures:
        raise DataError("no picture in this folder", where=folder, mend="check the path")
    listed = _read_metadata(lists)
    for stray in sorted(listed.keys() - set(pictures)):
        mend = "list files of this folder that are not hidden"
        raise DataError(f"listed in {METADATA} but not read from {folder}", where=stray, mend=mend)
    pictures = [picture for picture in pictures if _in_part(picture.relative_to(folder), part)]
    once: dict[tuple[Any, ...], Any] = {}  # few pictures have kinds or sizes of their own
    captioned = [_columns(_captions(picture, folder, source, listed.pop(picture, {})), once) for picture in pictures]
    merged: dict[str, Sample] = {}
    quarantined = []
    for picture, (captions, kinds), found in zip(pictures, captioned, inspected(pictures), strict=True):
        name, size = found.digest[:32], (found.width, found.height)
        if reason := found.fault or _too_small(size, source.min_size):
            quarantined.append(Quarantined(name, picture, reason))
            continue
        repeats = _kohya(picture, folder)[0]
        file = str(picture)
        if known := merged.get(name):
            both = dict(zip(captions, kinds, strict=True)) | dict(zip(known.captions, known.kinds, strict=True))
            captions, kinds = _columns({caption: both[caption] for caption in (*known.captions, *captions)}, once)
            file, repeats = known.file, max(known.repeats, repeats)
        merged[name] = Sample(name, file, captions, kinds, repeats, once.setdefault(size, size))
    if most := max((sample.repeats for sample in merged.values()), default=1) - 1:
        logger.info("%s: folders named like 10_name repeat their pictures, up to %d times", folder, most + 1)
    return [sample for _, sample in sorted(merged.items())], quarantined


def _columns(captions: dict[str, str], once: dict[tuple[Any, ...], Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(captions, kinds), the kinds shared between pictures."""
    kinds = tuple(captions.values())
    return tuple(captions), once.setdefault(kinds, kinds)


def _unreadable(error: OSError) -> None:
    mend = "make it readable, or move it elsewhere"
    raise DataError(f"cannot be read ({error.strerror})", where=error.filename, mend=mend) from None


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """(pictures, metadata.jsonl files) below a folder, in the order of their names."""
    pictures, lists = [], []
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in folders:
            if Path(root, name).is_symlink():
                mend = "name the folder that it leads to as a source of its own, or remove the link"
                raise DataError("links to folders are not followed", where=Path(root, name), mend=mend)
        for name in sorted(names):
            path, suffix = Path(root, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if not name.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in name):
                raise DataError("this file's name is no UTF-8", where=ascii(str(path)), mend="rename it")
            if suffix in OTHER_PICTURES:
                mend = "convert it to PNG or remove it"
                raise DataError(f"{suffix} pictures are not supported yet", where=path, mend=mend)
            if name in OTHER_LISTS:
                mend = f"write the captions into {METADATA} and remove it"
                raise DataError("not supported yet", where=path, mend=mend)
            if suffix in FORMATS:
                pictures.append(path)
            elif name == METADATA:
                lists.append(path)
    return pictures, lists


def _in_part(name: Path, part: Part) -> bool:
    if part[1] == 1:
        return True
    digest = hashlib.blake2b(name.as_posix().encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % part[1] == part[0]


def _too_small(size: tuple[int, int], least: int) -> str:
    return f"too small: {size[0]} x {size[1]} pixels, min_size is {least}" if min(size) < least else ""


def _kohya(picture: Path, folder: Path) -> tuple[int, str]:
    """(repeats, class name) of a picture's kohya folder, which is the source's folder or one in it; else (1, "")."""
    below = picture.relative_to(folder).parts[:-1]
    for name in (*below[:1], folder.name):
        if match := _KOHYA.fullmatch(name):
            return int(match[1]), match[2].replace("_", " ").strip()
    return 1, ""


def _captions(picture: Path, folder: Path, source: DataSource, listed: dict[str, str]) -> dict[str, str]:
    """Caption → kind of a picture, with the source's prefix."""
    captions = dict(listed)
    for caption in _read_sidecar(picture):
        captions.setdefault(caption, "")
    if not captions and source.folder_captions and (name := _kohya(picture, folder)[1]):
        captions = {name: ""}
    if not captions:
        raise DataError("this picture has no caption", where=picture, mend=MEND_CAPTION)
    return {source.prefix + caption: kind for caption, kind in captions.items()}


def _read_sidecar(picture: Path) -> list[str]:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return []
    captions = [line.strip() for line in _read_text(path).split("\n") if line.strip()]
    if not captions:
        raise DataError("this caption file is empty", where=path, mend="write one caption per line")
    return captions


def _read_metadata(paths: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """Caption → kind for each picture listed in these metadata.jsonl files."""
    listed: dict[Path, dict[str, str]] = {}
    for path in paths:
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            picture, captions = _read_row(path.parent, line, where)
            known = listed.setdefault(picture, {})
            for caption, kind in captions:
                known.setdefault(caption, kind)
    return listed


def _read_row(folder: Path, line: str, where: str) -> tuple[Path, list[tuple[str, str]]]:
    try:
        row = plainjson.parse(line)
    except ValueError as error:
        raise DataError(f"not valid JSON ({error})", where=where, mend="write one JSON object per line") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError("no file_name in this line", where=where, mend='write {"file_name": "a.png", "text": "…"}')
    picture = Path(os.path.normpath(folder / row["file_name"]))
    if not picture.is_file():
        raise DataError(
            f"listed file {row['file_name']!r} is missing", where=where, mend="put it back or remove the line"
        )
    if picture.suffix.lower() not in FORMATS:
        raise DataError(f"listed file {row['file_name']!r} is no picture of a format that is read", where=where)
    captions = [pair for column in COLUMNS if column in row for pair in _spread(row[column], f"{where}: {column}")]
    if not captions:
        raise DataError("no caption in this line", where=where, mend=f"add one of {', '.join(COLUMNS)}")
    return picture, captions


def _spread(value: object, where: str) -> list[tuple[str, str]]:
    """(caption, kind) pairs of a caption column."""
    pairs: list[tuple[object, str]]
    if isinstance(value, dict):
        pairs = [(text, str(kind)) for kind, texts in value.items() for text, _ in _spread(texts, f"{where}.{kind}")]
    else:
        pairs = [(text, "") for text in (value if isinstance(value, list) else [value])]
    found = []
    for text, kind in pairs:
        if not isinstance(text, str) or not text.strip():
            mend = "write a text, a list of texts, or texts by name"
            raise DataError(f"{text!r} is no caption", where=where, mend=mend)
        found.append((" ".join(text.split()), kind))
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 ({error})", where=path, mend="save it as UTF-8") from None
