"""What was answered and is not in metadata.jsonl yet: a line each, on the disk at once.

DATA/.caption/.lock                       of whoever writes metadata.jsonl
DATA/.caption/settings/DIGEST.json        what captions with this digest were made by
DATA/.caption/failed.jsonl                pictures and captions without a usable answer
DATA/.caption/part-2-of-8/.lock           of the process that captions this part
DATA/.caption/part-2-of-8/answers.jsonl   its journal
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from libreflux import plainjson
from libreflux.captioning.answers import MEANINGS, Fault
from libreflux.errors import RunError
from libreflux.files import lock
from libreflux.places import placed

KEPT = ".caption"
"""The folder of what is no caption: hidden, so that nothing reads it as data."""
ANSWERS = "answers.jsonl"
FAILED = "failed.jsonl"
WAIT = 120.0
"""Seconds that a process waits for another one that writes metadata.jsonl."""


@dataclass(frozen=True)
class Entry:
    """One settled question.

    Attributes:
        file: the picture's path below the folder, with "/".
        name: the caption's.
        caption: or the last answer, where there is a fault.
        by: digest of what it was made by.
        fault: None for a caption.
        tries: how often it was asked.
        over: whether it may take the place of a caption that is there.
    """

    file: str
    name: str
    caption: str
    by: str
    fault: Fault | None = None
    tries: int = 1
    over: bool = False


class Journal:
    """The journal of one part, whose folder is locked by the caller; nothing is in it at first.

    Args:
        folder: of the part.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS

    def add(self, entry: Entry) -> None:
        """Writes an answer down for good."""
        with placed(self._path), open(self._path, "ab") as file:
            file.write(json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(folder: Path) -> list[Entry]:
    """The answers of a part; a last line that was cut short by a kill is none.

    Raises:
        RunError: a damaged journal.
    """
    path = folder / ANSWERS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = plainjson.parse(line.decode())
            entry = Entry(**row)
            texts = (entry.file, entry.name, entry.caption, entry.by)
            if not all(isinstance(text, str) for text in texts) or entry.fault not in (None, *MEANINGS):
                raise ValueError("no answer")
            found.append(entry)
        except (ValueError, TypeError) as error:
            told = f"line {number} cannot be read ({error})"
            hint = "remove this line; its picture is asked about again"
            raise RunError(told, where=path, hint=hint) from None
    return found


def part_folder(kept: Path, part: tuple[int, int]) -> Path:
    """Where the i-th of n parts, from 0, is at work."""
    return kept / f"part-{part[0] + 1}-of-{part[1]}"


@contextmanager
def part_lock(kept: Path, part: tuple[int, int]) -> Iterator[None]:
    """Holds the folder of a part.

    Raises:
        RunError: another process captions this part.
    """
    with contextlib.ExitStack() as held:
        with writing(kept):  # who brings in the journal of a killed process holds its part meanwhile
            held.enter_context(lock(part_folder(kept, part)))
        yield


def is_held(error: RunError) -> bool:
    """Whether a folder could not be locked because another process has it."""
    return "in use by process" in error.what


@contextmanager
def writing(kept: Path) -> Iterator[None]:
    """Holds the right to write metadata.jsonl; waits while another process has it.

    Raises:
        RunError: it has it for longer than a write takes.
    """
    ends = time.monotonic() + WAIT
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(kept))
                break
            except RunError as error:
                if not is_held(error) or time.monotonic() > ends:
                    raise
                time.sleep(0.05)
        yield
