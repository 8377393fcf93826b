"""What a model was trained on, as far as that is known: pictures by their content, or scenes that a family composes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class TrainingPicture:
    """A picture that was trained on, or that a cache holds.

    Attributes:
        id: see `data.sources.Sample`.
        path: a file that holds it; None where none is left.
        background: laid under it where it is transparent.
        trained: whether it is known to be trained on; False: a cache holds it, and nothing says what for.
    """

    id: str
    path: Path | None
    background: str = "white"
    trained: bool = True


@dataclass(frozen=True)
class TrainingSet:
    """The pictures of one run, one cache or one folder.

    Attributes:
        name: as the user knows it.
        pictures: in any order, each once.
        cache: that holds their latents; None without.
        whole: False where more may belong to it than what is known, as a part of the cache or of its memory is lost.
    """

    name: str
    pictures: Sequence[TrainingPicture]
    cache: Path | None = None
    whole: bool = True


@dataclass(frozen=True, eq=False)
class MeasuredPicture:
    """A picture that a model is measured on.

    Attributes:
        id: see `data.sources.Sample`.
        path: its file.
        caption: under which it is measured.
        pixels: uint8 [H, W, 3], the crop that is measured.
    """

    id: str
    path: Path
    caption: str
    pixels: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class NearestScene:
    """The scene of a model's training that is nearest to a measured picture's own.

    Attributes:
        name: what it shows, e.g. its caption.
        distance: in whatever the family measures scenes by.
        seen: whether it is the very scene.
        picture: as it was trained on; None where it cannot be shown.
    """

    name: str
    distance: float
    seen: bool
    picture: Image.Image | None = None


class SceneFinder(Protocol):
    """For a family that composes its pictures: it knows what its models were trained on without any file."""

    def __call__(self, picture: MeasuredPicture) -> NearestScene | None:
        """The scene that is nearest to the picture's own; None for a picture that the family has not composed."""
