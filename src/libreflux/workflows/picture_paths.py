"""Where pictures are written: one file, or a folder of numbered names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from libreflux.errors import OptionHint, RecipeError, RunError
from libreflux.places import file_place

ANOTHER_PLACE = OptionHint("name another place with `out`")


def picture_paths_of(out: Path, pictures: Sequence[tuple[str, int]], count: int = 1) -> list[Path]:
    """Where each picture goes: the one file, or numbered names in a folder; the place is tried.

    Args:
        out: a .png file for one picture, or a folder.
        pictures: prompt and seed of each.
        count: how many of them, one after the other, share a prompt and its number.

    Raises:
        RecipeError: several pictures for one file, a file that is no PNG, or a file where a folder is needed.
        RunError: nothing can be written there.
    """
    targets = _named_targets(out, pictures, count)
    file_place(targets[0])
    for target in targets[1:]:
        if target.is_dir():
            raise RunError("is a folder", where=target, hint=ANOTHER_PLACE)
    return targets


def _named_targets(out: Path, pictures: Sequence[tuple[str, int]], count: int) -> list[Path]:
    above = next((folder for folder in out.absolute().parents if os.path.lexists(folder)), Path("/"))
    if not above.is_dir():
        raise RecipeError("is a file, not a folder", where=above, hint=ANOTHER_PLACE)
    if out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise RecipeError(f"{out.suffix} is not written", where=out, hint="name a .png file or a folder")
        if len(pictures) > 1:
            raise RecipeError(f"{len(pictures)} pictures do not fit one file", where=out, hint="name a folder")
        return [out]
    if out.exists() and not out.is_dir():
        raise RecipeError("is a file, not a folder", where=out, hint="name a .png file or a folder")
    return [
        out / f"{index // count + 1:03d}-{_slug(prompt)}-seed{seed}.png"
        for index, (prompt, seed) in enumerate(pictures)
    ]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
