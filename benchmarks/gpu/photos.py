"""Captioned pictures of smooth colours, at two shapes: python3 photos.py FOLDER COUNT SIDE"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    *("red", "blue", "green", "small", "large", "fox", "rocket", "house", "tree", "on", "at", "left", "right"),
    *("snow", "yellow", "behind", "window", "cup", "of", "tea", "a", "the"),
)


def write(folder: Path, count: int, side: int) -> None:
    """COUNT pictures with captions of 40 words: squares of SIDE pixels, and oblongs of about as many."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    oblong = side * 5 // 4 // 16 * 16, side * 4 // 5 // 16 * 16
    for number in range(count):
        colours = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        size = (side, side) if number % 2 else oblong
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(" ".join(random.choice(WORDS, 40)), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
