"""The folder of an inspection of attention: a page, the numbers, the pictures, and nothing of anybody else's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import OptionHint, RunError
from libreflux.files import atomic_write_bytes, atomic_write_json, atomic_write_text, sweep
from libreflux.places import file_place, folder_place

PAGE, FILE = "index.html", "attention.json"
_MARK = ".attention"
"""A hidden file of every folder that was made here, whole or not."""


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
        if not self.out.is_dir() or (self.out / _MARK).is_file():
            return
        if others := sorted(name for name in os.listdir(self.out) if not name.startswith(".")):
            what = f"is not empty ({others[0]}), and was not made by this command"
            raise RunError(what, where=self.out, hint=OptionHint("name a new folder with `out`"))

    def begin(self) -> None:
        """Removes what an earlier result wrote there, as its JSON lists it; the folder is locked."""
        sweep(self.out)
        atomic_write_text(self.out / _MARK, "made by libreflux\n")
        for name in _listed(self.file):
            if Path(name).name == name:  # in this folder, whatever the file says
                (self.out / name).unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> Path:
        """Writes a file, which the JSON then lists."""
        atomic_write_bytes(self.out / name, data)
        self._written.append(name)
        return self.out / name

    def finish(self, values: Mapping[str, Any]) -> None:
        """Writes the JSON: what is there without it is not whole."""
        atomic_write_json(self.file, {"schema": 1, **values, "files": self._written})


def _listed(path: Path) -> list[str]:
    try:
        return [str(name) for name in plainjson.parse(path.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
