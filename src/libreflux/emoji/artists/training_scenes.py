"""Every scene that the family was trained on, as a small index: the scene's seed, and what it is looked for by.

The base was trained on the scenes of `base`, its student on `teaching` (in pictures of its own or composed), the freed
model on `freeing`. A scene is a function of its seed and index, so the index need not hold more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from libreflux.emoji.artists import held_out
from libreflux.emoji.artists.scenes import KINDS, Background, Scene, scene
from libreflux.emoji.artists.subjects import all_subjects
from libreflux.emoji.compose import COLOURS
from libreflux.errors import DataError
from libreflux.files import atomic_write_bytes

FILE = Path(__file__).parent / "training-scenes.npz"
_COLUMNS = ("seed", "index", "first", "second", "ground")
NOBODY = 255


@dataclass(frozen=True)
class TrainingScenes:
    """Columns of N scenes.

    Attributes:
        seed, index: of `scenes.scene`, [N] int64.
        first, second: numbers of the subjects, [N] uint8; `NOBODY` for no second one.
        ground: of the background, see `ground_number`, [N] uint16.
    """

    seed: np.ndarray
    index: np.ndarray
    first: np.ndarray
    second: np.ndarray
    ground: np.ndarray

    def with_subject(self, name: str, ground: int | None = None) -> Iterator[Scene]:
        """The scenes that show a subject, on one background or on any."""
        number = _numbers()[name]
        shown = (self.first == number) | (self.second == number)
        if ground is not None:
            shown &= self.ground == ground
        for row in np.flatnonzero(shown).tolist():
            yield scene(int(self.seed[row]), int(self.index[row]))

    def __len__(self) -> int:
        return len(self.seed)


@cache
def _numbers() -> dict[str, int]:
    return {subject.name: number for number, subject in enumerate(all_subjects())}


def ground_number(background: Background) -> int:
    """A number of its own for each background that looks otherwise."""
    colours, kinds = list(COLOURS), list(KINDS)
    second = colours.index(background.second) if background.second else 0
    upright = background.upright and background.kind != "plain"
    return ((kinds.index(background.kind) * 2 + upright) * len(colours) + colours.index(background.first)) * len(
        colours
    ) + second


def listed(seed: int, count: int, wanted: Callable[[Scene], bool] = lambda what: True) -> TrainingScenes:
    """The first `count` training scenes of a seed that are wanted."""
    rows: list[tuple[int, ...]] = []
    number = 0
    while len(rows) < count:
        index, what = held_out.training_draw(seed, number)
        number += 1
        if wanted(what):
            figures = [_numbers()[figure.subject.name] for figure in what.figures] + [NOBODY]
            rows.append((seed, index, *figures[:2], ground_number(what.background)))
    kinds = (np.int64, np.int64, np.uint8, np.uint8, np.uint16)
    columns = np.array(rows, np.int64).T
    return TrainingScenes(*(column.astype(kind) for column, kind in zip(columns, kinds, strict=True)))


def write(sets: list[TrainingScenes], file: Path = FILE) -> Path:
    """Writes an index of several sets, compressed."""
    import io

    whole: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in sets]) for name in _COLUMNS}
    made = io.BytesIO()
    np.savez_compressed(made, **whole)
    atomic_write_bytes(file, made.getvalue())
    return file


@cache
def read(file: Path = FILE) -> TrainingScenes:
    """The index of the family's training, or another.

    Raises:
        DataError: no such file.
    """
    if not file.is_file():
        raise DataError("no index of training scenes", where=file, hint="python -m libreflux.emoji.artists.build index")
    with np.load(file, allow_pickle=False) as kept:
        return TrainingScenes(*(kept[name] for name in _COLUMNS))
