"""Prompts, one after another: from a text file, from metadata.jsonl, or the captions of a folder.

A prompt has single spaces: so it is the same text in a caption file, with one caption a line, and in metadata.jsonl.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from libreflux import plainjson
from libreflux.data.pictures import Inspected
from libreflux.data.sources import COLUMNS, read, read_text, spread_captions
from libreflux.errors import DataError
from libreflux.places import did_you_mean
from libreflux.recipe import DataSource

LISTS = (".jsonl",)
_NOT_READ = frozenset({".json", ".ndjson", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".xml", ".toml"})
_MARK = "\ufeff"  # a byte order mark: files that were joined have one in the middle


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file or a folder, in their order; one that is there twice is twice in the list.

    Args:
        path: a text file with one prompt a line, of which every line that is not blank is one; a `.jsonl` file like
            metadata.jsonl, of whose pictures none is looked at, and in which a caption that one line has twice counts
            once; or a folder of captioned pictures, by file name.

    Raises:
        DataError: no such file, one of another format, not UTF-8, no prompt in it, or what is refused of captions
            elsewhere.
    """
    if path.is_dir():
        prompts = _of_folder(path)
    elif not path.exists():
        raise DataError("no such file", where=path, hint=did_you_mean(path))
    elif (suffix := path.suffix.lower()) in _NOT_READ:
        hint = "write a .txt with one prompt a line, or a .jsonl with captions"
        raise DataError(f"prompts are not read from {suffix} files", where=path, hint=hint)
    else:
        text = read_text(path).replace(_MARK, "")
        prompts = list(_of_list(path, text) if path.suffix.lower() in LISTS else text.split("\n"))
    plain = [" ".join(prompt.split()) for prompt in prompts]
    found = [prompt for prompt in plain if prompt]
    if not found:
        raise DataError("no prompt in it", where=path, hint="write one prompt a line")
    return found


def _of_list(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = plainjson.parse(line)
        except ValueError as error:
            raise DataError(f"not valid JSON ({error})", where=where, hint="write one JSON object per line") from None
        columns = [column for column in COLUMNS if isinstance(row, dict) and column in row]
        if not columns:
            raise DataError("no caption in this line", where=where, hint=f"add one of {', '.join(COLUMNS)}")
        told = (spread_captions(row[column], f"{where}: {column}") for column in columns)
        yield from dict.fromkeys(caption for pairs in told for caption, _ in pairs)


def _of_folder(folder: Path) -> list[str]:
    samples = read(DataSource(path=str(folder)), _unopened).samples
    return [caption for sample in sorted(samples, key=lambda one: one.file) for caption in sample.captions]


def _unopened(paths: Sequence[Path]) -> Iterator[Inspected]:
    """Pictures of which the captions alone are wanted: each is one of its own, and none is read."""
    for path in paths:
        yield Inspected(hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest(), 1, 1, "")
