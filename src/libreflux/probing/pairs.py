"""Measured pictures beside the training pictures nearest to them: the closest few, kept to be shown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from libreflux.data.crops import View
from libreflux.files import atomic_write_bytes
from libreflux.probing.compare_training import Compared, crop_of
from libreflux.probing.results import Coordinate, Picture
from libreflux.probing.trained import PictureCheck
from libreflux.probing.training_pictures import MeasuredPicture
from libreflux.result_key import digest

PURPOSE = "nearest"
PAIRS = 6
SIDE = 256
"""Pixels of the longer side of what is kept."""


def keep_pairs(out: Path, measured: Sequence[MeasuredPicture], compared: Compared, view: View) -> list[Picture]:
    """Writes the closest pairs into `out/pictures`: those that were trained on first, then by their pixels.

    Each is kept with its row, counted from 0, and with what it is: "measured", or nearest by "pixels", "content" or
    "scene".
    """
    kept: list[Picture] = []
    for row, number in enumerate(_closest(compared.check.rows)[:PAIRS]):
        check, one, scene = compared.check.rows[number], measured[number], compared.scenes[number]
        kept.append(_keep(out, Image.fromarray(one.pixels), row, "measured", one.id, name=one.caption, seen=check.seen))
        for what in ("pixels", "content"):
            near = check.pixels if what == "pixels" else check.content
            crop = None if near is None else crop_of(compared.pictures[near.id], view)
            if near is not None and crop is not None:
                picture = Image.fromarray(crop)
                kept.append(_keep(out, picture, row, what, one.id, name=near.name, distance=near.distance))
        if scene is not None and scene.picture is not None:
            kept.append(_keep(out, scene.picture, row, "scene", one.id, name=scene.name, distance=scene.distance))
    return kept


def _closest(rows: Sequence[PictureCheck]) -> list[int]:
    def order(number: int) -> tuple[bool, float, str]:
        near = [one.distance for one in (rows[number].pixels, rows[number].scene) if one is not None]
        return rows[number].seen is None, min(near, default=np.inf), rows[number].id

    shown = [number for number, row in enumerate(rows) if row.seen or row.pixels or row.content or row.scene]
    return sorted(shown, key=order)


def _keep(
    out: Path,
    picture: Image.Image,
    row: int,
    what: str,
    measured: str,
    *,
    name: str,
    distance: float | None = None,
    seen: str | None = None,
) -> Picture:
    at: dict[str, Coordinate] = {"row": float(row), "what": what, "measured": measured, "name": name}
    at |= {} if distance is None else {"distance": float(distance)}
    at |= {} if seen is None else {"seen": seen}
    small, held = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(held, "PNG")
    file = f"pictures/{PURPOSE}-{digest([at, small.size])[:16]}.png"
    atomic_write_bytes(out / file, held.getvalue())
    return Picture(file=file, at=at, purpose=PURPOSE)
