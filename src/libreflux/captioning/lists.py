"""Captions in metadata.jsonl: which there are, and how new ones come in beside what others wrote.

A row of ours is `{"file_name": …, "captions": {"short": …, "long": …}, "captioned_by": {"short": DIGEST, …}}`. The rows
of others stay as they are, but for a caption that is to be overwritten.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.captioning.answers import MEANINGS, WORTH_ASKING_AGAIN
from libreflux.captioning.journal import ANSWERS, FAILED, KEPT, Entry, is_held, part_folder, read_journal, writing
from libreflux.captioning.wanted import place_of_name
from libreflux.data.folders import CAPTIONS, METADATA, Folder
from libreflux.data.sources import COLUMNS, read_lists, read_sidecar, read_text
from libreflux.errors import DataError, RunError
from libreflux.files import atomic_write_text, lock

BY = "captioned_by"
_OURS = ("file_name", "captions", BY)


@dataclass
class Known:
    """What is there of captions.

    Attributes:
        names: of each picture that has captions, by its path below the folder: the caption's name to the digest of what
            it was made by, "" for those of others; captions without a name are "".
        failed: (picture, name) to the digest of what got no usable answer; asked in the same way, it would not again.
    """

    names: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def of(self, file: str) -> Mapping[str, str]:
        """Of one picture."""
        return self.names.get(file, {})


def known_captions(root: Path, found: Folder) -> Known:
    """Reads which captions there are.

    Args:
        root: the folder of pictures.
        found: what lies in it.

    Raises:
        DataError: a list or a side-car that `prepare` would refuse too.
    """
    known = Known()
    for picture, listed in read_lists(found.lists).items():
        known.names[_below(root, picture)] = {one.kind: "" for one in listed}
    for path in found.lists:
        for row in _List(path).rows:
            if row.values is not None and (file := _file_of(root, path, row.values)) is not None:
                known.names.setdefault(file, {}).update(_marks(row.values))
    for picture in found.pictures:
        usual = picture.with_suffix(CAPTIONS[0])
        sidecars = [*([usual] if usual.is_file() else ()), *found.sidecars.get(picture, ())]
        if sidecars:
            for sidecar in sidecars:
                read_sidecar(sidecar)
            known.names.setdefault(_below(root, picture), {})[""] = ""
    for entry in read_failed(root / KEPT):
        if entry.fault in WORTH_ASKING_AGAIN:
            known.failed[entry.file, entry.name] = entry.by
    return known


def made_captions(root: Path, found: Folder) -> dict[str, dict[str, str]]:
    """The captions that were made here, by picture and name, in the order of the pictures."""
    made: dict[str, dict[str, str]] = {}
    for path in found.lists:
        for row in _List(path).rows:
            file = None if row.values is None else _file_of(root, path, row.values)
            if row.values is None or file is None:
                continue
            marks = _marks(row.values)
            for column in COLUMNS:
                texts = row.values.get(column)
                if isinstance(texts, dict):
                    made.setdefault(file, {}).update({name: str(texts[name]) for name in marks if name in texts})
    order = [_below(root, picture) for picture in found.pictures]
    return {file: dict(sorted(made[file].items(), key=_by_name)) for file in order if made.get(file)}


def _by_name(pair: tuple[str, str]) -> tuple[int, str]:
    return place_of_name(pair[0])


def read_failed(kept: Path) -> list[Entry]:
    """The list of what has no usable answer, in its order; rows that cannot be read are none."""
    try:
        lines = (kept / FAILED).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            row = plainjson.parse(line) if line else {}
            texts = row["file_name"], row["name"], row["answer"], row[BY]
            if all(isinstance(text, str) for text in texts) and row["fault"] in MEANINGS:
                found.append(Entry(*texts, row["fault"], int(row["tries"]), bool(row.get("over"))))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def merge_left_journals(root: Path, found: Folder) -> int:
    """Brings the journals of killed processes into metadata.jsonl; returns how many answers that were.

    Those of parts whose folder is locked are left alone: they are at work.
    """
    taken = 0
    for folder in sorted((root / KEPT).glob("part-*-of-*")):
        if not (folder / ANSWERS).is_file():
            continue
        try:
            with writing(root / KEPT), lock(folder):
                taken += _merge_journal(root, found.lists, folder)
        except RunError as error:
            if not is_held(error):
                raise
    return taken


def merge_own_journal(root: Path, found: Folder, part: tuple[int, int]) -> None:
    """Brings this process's own journal into metadata.jsonl; its folder is locked by the caller."""
    with writing(root / KEPT):
        _merge_journal(root, found.lists, part_folder(root / KEPT, part))


def _merge_journal(root: Path, lists: Sequence[Path], folder: Path) -> int:
    entries = read_journal(folder)
    # A caption of a picture that was removed since would be a row that `prepare` refuses.
    captions = [entry for entry in entries if entry.fault is None and (root / entry.file).is_file()]
    if captions:
        _write_captions(root, lists, captions)
    if entries:
        _write_failed(root, entries)
    (folder / ANSWERS).unlink(missing_ok=True)
    return len(entries)


def _write_captions(root: Path, lists: Sequence[Path], entries: Iterable[Entry]) -> None:
    own = root / METADATA
    tables = {path: _List(path) for path in dict.fromkeys([own, *lists])}
    named, ours = dict[tuple[str, str], list[tuple[_List, _Row, str]]](), dict[str, _Row]()
    for path, table in tables.items():
        for row in table.rows:
            file = None if row.values is None else _file_of(root, path, row.values)
            if row.values is None or file is None:
                continue
            for column in COLUMNS:
                for name in row.values[column] if isinstance(row.values.get(column), dict) else ():
                    named.setdefault((file, name), []).append((table, row, column))
            if path == own and row.is_ours:
                ours[file] = row
    for entry in entries:
        there = named.get((entry.file, entry.name), [])
        if there and not (
            entry.over and any(_marks(row.values or {}).get(entry.name) != entry.by for _, row, _ in there)
        ):
            continue  # somebody wrote it meanwhile, or a process that was killed before it removed its journal
        for table, row, column in there:
            row.put(column, entry)
            table.changed = True
        if not there:
            table = tables[own]
            if entry.file not in ours:
                ours[entry.file] = _Row("", {"file_name": entry.file, "captions": {}, BY: {}})
                table.rows.append(ours[entry.file])
            ours[entry.file].put("captions", entry)
            named[entry.file, entry.name] = [(table, ours[entry.file], "captions")]
            table.changed = True
    for table in tables.values():
        if table.changed:
            table.write()


def _write_failed(root: Path, entries: Iterable[Entry]) -> None:
    kept = root / KEPT
    rows = {(one.file, one.name): one for one in read_failed(kept)}
    for entry in entries:
        rows.pop((entry.file, entry.name), None)
        if entry.fault is not None:
            rows[entry.file, entry.name] = entry
    lines = []
    for (file, name), one in sorted(rows.items(), key=lambda row: (row[0][0], place_of_name(row[0][1]))):
        if (root / file).is_file():
            told = {"file_name": file, "name": name, "fault": one.fault, "answer": one.caption, "tries": one.tries}
            told |= {BY: one.by} | ({"over": True} if one.over else {})
            lines.append(json.dumps(told, ensure_ascii=False))
    if lines or (kept / FAILED).exists():
        atomic_write_text(kept / FAILED, "".join(f"{line}\n" for line in lines))


class _Row:
    """A line of a list: as it stands there, and its values where they are a mapping."""

    def __init__(self, line: str, values: dict[str, Any] | None) -> None:
        self.line, self.values, self.changed = line, values, not line

    @property
    def is_ours(self) -> bool:
        """Whether we made it, and nobody gave it another shape."""
        values = self.values or {}
        return set(values) == set(_OURS) and all(isinstance(values[name], dict) for name in _OURS[1:])

    def put(self, column: str, entry: Entry) -> None:
        """A caption in the place of another, or new."""
        assert self.values is not None
        self.values[column] = {**self.values[column], entry.name: entry.caption}
        marks = self.values.get(BY)
        self.values[BY] = {**(marks if isinstance(marks, dict) else {}), entry.name: entry.by}
        self.changed = True

    def text(self) -> str:
        """As it is to stand there: our rows have their names in one order."""
        if not self.changed:
            return self.line
        assert self.values is not None
        if self.is_ours:
            for part in ("captions", BY):
                self.values[part] = {
                    name: self.values[part][name] for name in sorted(self.values[part], key=place_of_name)
                }
        return json.dumps(self.values, ensure_ascii=False)


class _List:
    """A metadata.jsonl in its lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False
        self.rows = list(_rows(path)) if path.is_file() else []

    def write(self) -> None:
        """Replaces the file: rows of others in their order, ours behind them by file name.

        Its mark (BOM) and its line ends stay. Where it is a link, what it leads to is replaced, and the link stays.
        """
        ours = sorted((row for row in self.rows if row.is_ours), key=lambda row: str((row.values or {})["file_name"]))
        others = [row for row in self.rows if not row.is_ours]
        raw = self.path.read_bytes() if self.path.is_file() else b""
        mark, end = "\ufeff" if raw.startswith(codecs.BOM_UTF8) else "", "\r\n" if b"\r\n" in raw else "\n"
        text = mark + "".join(f"{row.text()}{end}" for row in [*others, *ours])
        atomic_write_text(Path(os.path.realpath(self.path)), text)


def _rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = plainjson.parse(line)
        except ValueError as error:
            what = f"not valid JSON ({error})"
            raise DataError(what, where=f"{path}, line {number}", hint="write one JSON object per line") from None
        yield _Row(line, values if isinstance(values, dict) else None)


def _marks(values: Mapping[str, Any]) -> dict[str, str]:
    """Name to digest of the captions in a row that we made."""
    told = values.get(BY)
    names = {name for column in COLUMNS if isinstance(values.get(column), dict) for name in values[column]}
    return {name: str(told[name]) for name in names if name in told} if isinstance(told, dict) else {}


def _file_of(root: Path, path: Path, values: Mapping[str, Any]) -> str | None:
    name = values.get("file_name")
    return _below(root, path.parent / name) if isinstance(name, str) else None


def _below(root: Path, path: Path) -> str:
    return Path(os.path.relpath(os.path.normpath(path), root)).as_posix()
