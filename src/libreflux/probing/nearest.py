"""The nearest of many training pictures, which pass by one after another: by pixels, by features, by latents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

THUMBNAIL = 32
"""Pixels per side of what pictures are compared by."""
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(measured [M, D], one training picture's [D]) → [M]."""


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """[3072] fp32, 0 to 255: a picture (uint8 [H, W, 3]) at 32 x 32 pixels, each the mean of what it stands for."""
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)


def mean_absolute(measured: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Mean absolute difference."""
    found: np.ndarray = np.abs(measured - one).mean(1)
    return found


def root_mean_square(measured: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Root mean square of the difference."""
    found: np.ndarray = np.sqrt(np.square(measured - one).mean(1))
    return found


def cosine(measured: np.ndarray, one: np.ndarray) -> np.ndarray:
    """1 - cosine of the angle between them, 0 to 2; 1 beside a vector of zeros."""
    lengths = np.linalg.norm(measured, axis=1) * np.linalg.norm(one)
    similar = np.divide(measured @ one, lengths, out=np.zeros(len(measured), np.float32), where=lengths > 0)
    return 1.0 - np.clip(similar, -1.0, 1.0)


class Closest:
    """Of each of M measured pictures the nearest of those that were offered; of equal ones the first.

    Args:
        measured: [M, D] fp32, what they are compared by.
        distance: between them and one that is offered; what is not finite is never the nearest.

    Attributes:
        distances: [M] fp64, infinite where nothing was near.
        nearest: [M] the numbers that the nearest were offered under, -1 for none.
    """

    def __init__(self, measured: np.ndarray, distance: Distance) -> None:
        self._measured, self._distance = measured, distance
        self.distances = np.full(len(measured), np.inf)
        self.nearest = np.full(len(measured), -1)

    def offer(self, number: int, one: np.ndarray) -> None:
        """Compares one training picture."""
        found = self._distance(self._measured, one).astype(np.float64)
        nearer = found < self.distances
        self.distances[nearer] = found[nearer]
        self.nearest[nearer] = number

    def take(self, row: int, number: int, distance: float) -> None:
        """Compares one training picture, whose distance to one measured picture is known."""
        if distance < self.distances[row]:
            self.distances[row], self.nearest[row] = distance, number
