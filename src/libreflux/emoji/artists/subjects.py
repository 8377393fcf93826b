"""The subjects, their artists, and every drawing as a cut-out with alpha."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "drawings"
SIDE = 128
COLUMNS = 10  # drawings in a row of a look's sheet

LOOKS = ("3d", "flat", "soft", "detailed", "retro", "cartoon")
"""The artists, by the word that captions have: Fluent 3D, Fluent flat, FxEmoji, Noto, Noto v1, Twemoji."""


@dataclass(frozen=True)
class Subject:
    """One thing that is drawn. `looks`: who drew it, at least five of `LOOKS`; `unseen`: nothing trains on it."""

    name: str
    category: str
    looks: tuple[str, ...]
    unseen: bool


@cache
def all_subjects() -> tuple[Subject, ...]:
    """Every subject, in the order of `subjects.json`, which is the order of the drawings on each sheet."""
    listed = json.loads((FOLDER / "subjects.json").read_text(encoding="utf-8"))["subjects"]
    return tuple(
        Subject(entry["name"], entry["category"], tuple(entry["looks"]), entry.get("unseen", False)) for entry in listed
    )


def subjects() -> tuple[Subject, ...]:
    """The subjects that training pictures show."""
    return tuple(subject for subject in all_subjects() if not subject.unseen)


def unseen_subjects() -> tuple[Subject, ...]:
    """The subjects that no training picture of this family shows."""
    return tuple(subject for subject in all_subjects() if subject.unseen)


@cache
def _sheet(look: str) -> Image.Image:
    return Image.open(FOLDER / f"{look}.webp").convert("RGBA")


@cache
def drawing(name: str, look: str) -> Image.Image:
    """The drawing of a subject, RGBA, `SIDE` × `SIDE` pixels.

    Raises:
        KeyError: there is no such subject, or that artist has not drawn it.
    """
    numbers = {subject.name: number for number, subject in enumerate(all_subjects())}
    number = numbers[name]
    if look not in all_subjects()[number].looks:
        raise KeyError((name, look))
    row, column = divmod(number, COLUMNS)
    return _sheet(look).crop((column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE))
