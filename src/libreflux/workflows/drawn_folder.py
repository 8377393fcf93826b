"""A captioned folder that is drawn picture by picture: what is there and whole, and what it was begun with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from libreflux import plainjson
from libreflux.data.folders import CAPTIONS, METADATA
from libreflux.errors import OptionHint, RunError
from libreflux.files import atomic_write_json, atomic_write_text
from libreflux.places import file_place, folder_place
from libreflux.printing import counted, shortened
from libreflux.result_key import differing
from libreflux.sample.metadata import GenerationRecord, save_png

KEPT = ".generate"
"""Its folder of what is no picture: hidden, so that nothing reads it as data."""
SETTINGS = "settings.json"
_END = b"IEND\xaeB`\x82"  # of every whole PNG
_ANOTHER = OptionHint("name another folder with `out`, or give what it was begun with")
_MOST_TOLD = 4
_LEFT = re.compile(r"\.(\d{6}\.(png|txt)|metadata\.jsonl)\.tmp-[0-9a-f]{8}")
"""Temporary files of a killed process; whatever else is hidden in the folder is somebody's own."""


class DrawnFolder:
    """Pictures 000000.png, 000001.png and so on with their captions; a killed process leaves none of them by half.

    Args:
        out: the folder; need not exist.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    @property
    def memory(self) -> Path:
        """Folder for what is remembered of files."""
        return self.out / KEPT

    def check_place(self) -> None:
        """Raises RunError unless pictures can be written there: into a new folder, an empty one, or one of ours."""
        folder_place(self.out, KEPT)
        file_place(self.out / METADATA)
        if (self.memory / SETTINGS).is_file() or not self.out.is_dir():
            return
        if others := sorted(name for name in os.listdir(self.out) if not name.startswith(".")):
            what = f"is not empty ({others[0]}), and was not begun by this command"
            raise RunError(what, where=self.out, hint=OptionHint("name a new folder with `out`"))

    def begin(self, decided: Mapping[str, Any], count: int) -> None:
        """Notes what the pictures are functions of, or compares it with what was noted; the folder is locked.

        Args:
            decided: plain values by their names.
            count: how many pictures there are to be.

        Raises:
            RunError: the folder was begun with something else, which is named, or has more pictures.
        """
        path = self.memory / SETTINGS
        known = _read(path)
        if known is None:
            atomic_write_json(path, {"schema": 1, "decided": dict(decided)})
        elif names := differing(known, decided, {}):
            told = [_difference(name, known.get(name), decided.get(name)) for name in names[:_MOST_TOLD]]
            more = [f"{len(names) - _MOST_TOLD} more"] if len(names) > _MOST_TOLD else []
            raise RunError(f"was begun with {', '.join(told + more)}", where=self.out, hint=_ANOTHER)
        else:
            self._sweep()
        more_there = sum(self._index(name) >= count for name in os.listdir(self.out))
        if more_there:
            there = counted(count + more_there, "picture")
            hint = OptionHint("raise `count`, or name another folder with `out`")
            raise RunError(f"has {there} already, more than `count` {count}", where=self.out, hint=hint)

    def picture(self, index: int) -> Path:
        """The file of a picture."""
        return self.out / f"{index:06d}.png"

    def has(self, index: int, prompt: str) -> bool:
        """Whether a picture and its caption are there and whole."""
        path = self.picture(index)
        try:
            with open(path, "rb") as file:
                file.seek(-len(_END), os.SEEK_END)
                whole = file.read() == _END
            return whole and path.with_suffix(CAPTIONS[0]).read_text(encoding="utf-8") == _caption(prompt)
        except (OSError, UnicodeDecodeError):
            return False

    def write(self, index: int, image: Image.Image, record: GenerationRecord | None, prompt: str) -> Path:
        """Writes a picture and its caption, the caption first: a picture without one would not be read as data."""
        path = self.picture(index)
        atomic_write_text(path.with_suffix(CAPTIONS[0]), _caption(prompt))
        save_png(image, path, record)
        return path

    def finish(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Lists all pictures in metadata.jsonl; they are there."""
        rows = [
            json.dumps({"file_name": self.picture(index).name, "text": prompt, "seed": seed}, ensure_ascii=False)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        atomic_write_text(self.out / METADATA, "\n".join(rows) + "\n")

    def _sweep(self) -> None:
        for path in self.out.iterdir():
            if _LEFT.fullmatch(path.name) and path.is_file():
                path.unlink()

    def _index(self, name: str) -> int:
        stem, suffix = os.path.splitext(name)
        ours = suffix == ".png" and stem.isascii() and stem.isdigit() and len(stem) == 6
        return int(stem) if ours else -1


def _caption(prompt: str) -> str:
    return f"{prompt}\n"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        rows = plainjson.parse(path.read_text(encoding="utf-8"))
        if rows["schema"] != 1:
            raise RunError(f"schema {rows['schema']!r} is not 1", where=path, hint="update libreflux")
        return dict(rows["decided"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        hint = OptionHint("name another folder with `out`")
        raise RunError(f"cannot be read ({type(error).__name__}: {error})", where=path, hint=hint) from None


def _difference(name: str, known: object, now: object) -> str:
    """In words: the numbers and texts of both, and of anything that is long that it is another."""
    plain = all(one is None or isinstance(one, bool | int | float | str) for one in (known, now))
    if plain and all(len(str(one)) < 60 for one in (known, now)):
        told = (shortened("none" if one in (None, "") else str(one)) for one in (known, now))
        return f"{name} {' instead of '.join(told)}"
    return f"other {name}"
