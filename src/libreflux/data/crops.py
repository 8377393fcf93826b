"""An upright picture → crops of the sizes that training shows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from libreflux import seeding

ZOOM = 0.8  # the smallest window of a further crop, as a share of the largest one
WIDEST = 3.0  # the widest and tallest aspect bucket; what is wider loses its ends
SPARE = 0.25  # how far a bucket's area may be from the resolution's
SMALL = 256  # below this resolution buckets of 64 pixels would be too few


def bucket_step(resolution: int) -> int:
    """Pixels between the sides of aspect buckets: 64, or 16 for resolutions below 256 (the emoji family)."""
    return 16 if resolution < SMALL else 64


@dataclass(frozen=True)
class View:
    """A way of showing pictures.

    Attributes:
        crop: "square": the largest centred square, further crops from random windows; "centre": that square alone;
            "aspect": likewise with windows of the picture's own shape, as near as the buckets have it.
        resolution: side of the squares in pixels; aspect buckets have about as many pixels.
        step: multiple of which the sides of aspect buckets are.
    """

    crop: str
    resolution: int
    step: int = 64

    def crops(self, per_picture: int) -> int:
        """Cached crops of each picture."""
        return 1 if self.crop == "centre" else per_picture

    def name(self, index: int, background: str) -> str:
        """What a crop is cached under: everything that decides its pixels apart from the picture."""
        kind = f"{self.crop}-{self.step}" if self.crop == "aspect" else "square"
        return f"{kind}-{self.resolution}-{index}-{background.lower()}"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the crops of a picture of this size, in pixels."""
        if self.crop != "aspect":
            return self.resolution, self.resolution
        wanted = math.log(width / height)
        area = self.resolution**2
        return min(
            aspect_buckets(self.resolution, self.step),
            key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), abs(size[0] * size[1] - area)),
        )


def views(crops: Sequence[str], resolutions: Sequence[int]) -> list[View]:
    """Every crop at every resolution, each once."""
    return list(dict.fromkeys(View(crop, side, bucket_step(side)) for side in resolutions for crop in crops))


@functools.lru_cache(maxsize=16)
def aspect_buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """(width, height) in multiples of ``step``, of about resolution² pixels, from 1:3 to 3:1."""
    found = set()
    for long in range(step, int(resolution * WIDEST) + step, step):
        short = max(step, round(resolution**2 / long / step) * step)
        if short <= long <= WIDEST * short and abs(long * short / resolution**2 - 1) <= SPARE:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found))


def crop_window(
    width: int, height: int, size: tuple[int, int], index: int = 0, picture: str = ""
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of the part of a picture that a crop shows, of the crop's shape.

    Args:
        width: of the picture.
        height: of the picture.
        size: (width, height) of the crop.
        index: 0 is the largest centred window; further ones have 0.8 to 1 of its sides and a random place, keyed by
            (picture, index), never by a run's seed, so that a cache serves every run.
        picture: the sample's id.
    """
    scale = min(width / size[0], height / size[1])
    across, down = 0.5, 0.5
    if index > 0:
        zoom, across, down = seeding.rng(0, "crop", picture, index).random(3)
        scale *= ZOOM + (1 - ZOOM) * zoom
    wide, high = min(size[0] * scale, width), min(size[1] * scale, height)
    left, top = across * (width - wide), down * (height - high)
    return left, top, left + wide, top + high


def cut(image: Image.Image, view: View, index: int = 0, picture: str = "") -> np.ndarray:
    """One crop of an RGB picture as uint8 [height, width, 3], by one Lanczos resampling; see :func:`crop_window`."""
    size = view.size(*image.size)
    window = crop_window(*image.size, size, index, picture)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=window), dtype=np.uint8)
