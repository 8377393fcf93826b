"""Captioned folders of pictures to be measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from libreflux.files import staged_dir


def write_captioned(folder: Path, captions: Sequence[str], picture: Callable[[int], Image.Image]) -> Path:
    """Writes a picture of each caption, by its number, and `metadata.jsonl`; a folder with these captions is kept.

    Raises:
        RunError: the folder is there, and holds others.
    """
    rows = [json.dumps({"file_name": f"{number:04d}.png", "text": text}) for number, text in enumerate(captions)]
    listing, told = folder / "metadata.jsonl", "\n".join(rows) + "\n"
    if listing.is_file() and listing.read_text(encoding="utf-8") == told:
        return folder
    with staged_dir(folder) as staging:
        for number in range(len(captions)):
            picture(number).save(staging / f"{number:04d}.png")
        (staging / listing.name).write_text(told, encoding="utf-8")
    return folder
