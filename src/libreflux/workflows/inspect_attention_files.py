"""The folder of an inspection of attention: a page, the numbers, the pictures, and nothing of anybody else's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libreflux.errors import OptionHint, RunError
from libreflux.files import atomic_write_bytes, atomic_write_json, atomic_write_text, sweep
from libreflux.places import file_place, folder_place

PAGE, FILE = "index.html", "attention.json"
_MARK = ".attention"
"""A hidden file of every folder that was made here, whole or not: it lists the files, each before it is written."""
_NAMES = re.compile(r"\d{2,}(-[a-z-]+)?\.(png|safetensors)|index\.html|attention\.json")
"""What may be written."""


class AttentionFolder:
    """Where the result goes: a new folder, an empty one, or one that was made here before, whose files are replaced.

    Args:
        out: the folder; need not exist.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._written: list[str] = []

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.out / PAGE

    @property
    def file(self) -> Path:
        """The numbers, as JSON."""
        return self.out / FILE

    def check_place(self) -> None:
        """Raises RunError unless files can be written there, and nobody else's are in the way."""
        folder_place(self.out)
        for path in (self.page, self.file):
            file_place(path)
        if not self.out.is_dir():
            return
        mark = self.out / _MARK
        listed = _listed(mark)
        others = [name for name in sorted(os.listdir(self.out)) if not name.startswith(".") and name not in listed]
        if mark.is_file():  # what somebody added stays, unless it has the name of what is to be written
            others = [name for name in others if _NAMES.fullmatch(name)]
        if others:
            what = f"is not empty ({others[0]}), and was not made by this command"
            raise RunError(what, where=self.out, hint=OptionHint("name a new folder with `out`"))

    def begin(self) -> None:
        """Removes what an earlier result wrote there, whole or not; the folder is locked."""
        sweep(self.out)
        self.file.unlink(missing_ok=True)
        for name in _listed(self.out / _MARK):
            (self.out / name).unlink(missing_ok=True)
        self._note()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, which the JSON then lists."""
        self._note(name)
        atomic_write_bytes(self.out / name, data)
        self._written.append(name)

    def finish(self, values: Mapping[str, Any]) -> None:
        """Writes the JSON: what is there without it is not whole."""
        self._note(FILE)
        atomic_write_json(self.file, {"schema": 1, **values, "files": self._written})

    def _note(self, *more: str) -> None:
        atomic_write_text(self.out / _MARK, "".join(f"{name}\n" for name in (*self._written, *more)))


def _listed(mark: Path) -> list[str]:
    """The files that were made here; names of another kind are nobody's to remove, whatever the list says."""
    try:
        return [name for name in mark.read_text(encoding="utf-8").splitlines() if _NAMES.fullmatch(name)]
    except (OSError, UnicodeDecodeError):
        return []
