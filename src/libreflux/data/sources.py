"""Ordinary folders of captioned pictures, in the two spellings that people use.

Side-car: ``name.txt`` beside ``name.jpg``, one caption per line (kohya). ``metadata.jsonl``: one JSON object per line
with ``file_name`` and ``text``, ``prompt``, ``caption`` or ``captions`` (Hugging Face imagefolder); a caption column
holds a text, a list of texts, or texts by name (``{"short": …, "long": …}``). A picture may have both; a caption said
twice counts once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from libreflux.data.crops import FORMATS, check_header
from libreflux.errors import DataError
from libreflux.files import sha256_file
from libreflux.recipe import DataSource

OTHER_PICTURES = frozenset({".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd"})
OTHER_LISTS = ("metadata.csv", "metadata.parquet")
COLUMNS = ("text", "prompt", "caption", "captions")
METADATA = "metadata.jsonl"
MEND_CAPTION = "write a .txt of the same name beside it, one caption per line, or a line in metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One picture and what may be said of it.

    Attributes:
        id: first 32 hexadecimal digits of the SHA-256 of the file's bytes: the same picture is the same sample.
        path: the first file that holds it.
        captions: at least one, distinct, in reading order.
        kinds: each caption's name in ``metadata.jsonl``, "" for those without.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    kinds: tuple[str, ...]


def read_folder(path: Path | str, digest: Callable[[Path], str] = sha256_file) -> list[Sample]:
    """All captioned pictures below ``path``, sorted by id; hidden files and folders are left out.

    Args:
        path: the folder, read with its sub-folders.
        digest: SHA-256 of a file, for callers that remember it.

    Raises:
        DataError: no such folder, no picture in it, an unreadable picture, a picture without a caption, a listed file
            that is missing, or a format that is not read; the first of them, named.
    """
    folder = Path(os.path.normpath(Path(path).expanduser()))
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, mend="check data.path")
    pictures = list(_pictures(folder))
    if not pictures:
        raise DataError("no PNG, JPEG or WebP picture in this folder", where=folder, mend="check data.path")
    listed = _read_metadata(folder)
    for stray in sorted(listed.keys() - set(pictures)):
        mend = "list files of this folder that are not hidden"
        raise DataError(f"listed in {METADATA} but not read from {folder}", where=stray, mend=mend)
    merged: dict[str, tuple[Path, dict[str, str]]] = {}
    for picture in pictures:
        captions = dict(listed.get(picture, {}))
        for caption in _read_sidecar(picture):
            captions.setdefault(caption, "")
        if not captions:
            raise DataError("this picture has no caption", where=picture, mend=MEND_CAPTION)
        check_header(picture)
        _, known = merged.setdefault(digest(picture)[:32], (picture, {}))
        for caption, kind in captions.items():
            known.setdefault(caption, kind)
    return [
        Sample(id=name, path=first, captions=tuple(captions), kinds=tuple(captions.values()))
        for name, (first, captions) in sorted(merged.items())
    ]


def read_sources(
    sources: Sequence[DataSource], digest: Callable[[Path], str] = sha256_file
) -> list[tuple[DataSource, list[Sample]]]:
    """Every source with its samples, in the recipe's order."""
    return [(source, read_folder(source.path, digest)) for source in sources]


def _visible(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts):
            yield path


def _pictures(folder: Path) -> Iterator[Path]:
    for path in _visible(folder):
        suffix = path.suffix.lower()
        if suffix in OTHER_PICTURES:
            raise DataError(
                f"{suffix} pictures are not supported yet", where=path, mend="convert it to PNG or remove it"
            )
        if path.name in OTHER_LISTS:
            raise DataError("not supported yet", where=path, mend=f"write the captions into {METADATA} and remove it")
        if suffix in FORMATS:
            yield path


def _read_sidecar(picture: Path) -> list[str]:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return []
    captions = [line.strip() for line in _read_text(path).split("\n") if line.strip()]
    if not captions:
        raise DataError("this caption file is empty", where=path, mend="write one caption per line")
    return captions


def _read_metadata(folder: Path) -> dict[Path, dict[str, str]]:
    """Caption → kind for each picture listed in the metadata.jsonl of any sub-folder."""
    listed: dict[Path, dict[str, str]] = {}
    for path in _visible(folder):
        if path.name != METADATA:
            continue
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
        row = json.loads(line)
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
        raise DataError(f"listed file {row['file_name']!r} is not a PNG, JPEG or WebP picture", where=where)
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
