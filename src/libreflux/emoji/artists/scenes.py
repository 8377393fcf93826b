"""What a picture shows, as a function of (seed, index), and the picture: subjects, artists, places, sizes, background.

A scene leaves nothing open; its captions may (`captions`). What no training picture shows is in `held_out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from libreflux import seeding
from libreflux.emoji.artists.subjects import SIDE, Subject, drawing, subjects
from libreflux.emoji.compose import COLOURS

CELLS = 8  # of the picture, each way: one image token of the transformer, 16 pixels at a side of 128
SIZES = {"small": 4, "medium": 5, "large": 7}  # side of a lone subject, in cells
PAIR_SIZE = SIZES["small"]
OFF_CENTRE = 0.09  # of the side: from here on a place is "left", not "in the centre"
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # from the second to the first
KINDS = {"plain": 0.6, "gradient": 0.2, "halves": 0.2}
PAIRS = 0.2


@dataclass(frozen=True)
class Figure:
    """One subject in a picture. `cells`: its side; `column`, `row`: of its upper left corner, in cells too."""

    subject: Subject
    look: str
    cells: int
    column: int
    row: int
    mirrored: bool = False

    @property
    def size(self) -> str:
        """small, medium or large."""
        return {cells: size for size, cells in SIZES.items()}[self.cells]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of its centre, in sides of the picture."""
        return (self.column + self.cells / 2) / CELLS, (self.row + self.cells / 2) / CELLS

    @property
    def place(self) -> str:
        """centre, left, right, top, bottom, or two of them: "top left"."""
        x, y = self.centre
        across = _word(x - 0.5, "left", "right")
        down = _word(y - 0.5, "top", "bottom")
        return " ".join(word for word in (down, across) if word) or "centre"


def _word(offset: float, less: str, more: str) -> str:
    return less if offset < -OFF_CENTRE else more if offset > OFF_CENTRE else ""


@dataclass(frozen=True)
class Background:
    """`kind`: plain, gradient or halves; `first` lies left or on top, `second` is None where it is plain."""

    first: str
    second: str | None = None
    kind: str = "plain"
    upright: bool = True  # the two colours lie above each other


@dataclass(frozen=True)
class Scene:
    """What one picture shows: one figure, or two with the first's relation to the second."""

    figures: tuple[Figure, ...]
    background: Background
    relation: str | None = None


def scene(seed: int, index: int, *, pairs: float = PAIRS, pool: tuple[Subject, ...] | None = None) -> Scene:
    """The scene of (seed, index), held out or not; a share `pairs` of all scenes shows two subjects.

    Args:
        pool: the subjects to choose from; None: those that training pictures show.
    """
    rng = seeding.rng(seed, "artists-scene", index)
    pool = subjects() if pool is None else pool
    chosen = [pool[i] for i in rng.choice(len(pool), 2, replace=len(pool) < 2)]
    behind = _background(rng)
    if rng.random() >= pairs:
        cells = list(SIZES.values())[rng.integers(len(SIZES))]
        column, row = (int(rng.integers(CELLS - cells + 1)) for _ in range(2))
        return Scene((_figure(rng, chosen[0], cells, column, row),), behind)
    relation = str(rng.choice(list(RELATIONS)))
    return Scene(tuple(_beside(rng, chosen, relation)), behind, relation)


def _background(rng: np.random.Generator) -> Background:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    first, second = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    upright = bool(rng.random() < 0.5)
    return Background(first) if kind == "plain" else Background(first, second, kind, upright)


def _figure(rng: np.random.Generator, subject: Subject, cells: int, column: int, row: int) -> Figure:
    look = subject.looks[rng.integers(len(subject.looks))]
    return Figure(subject, look, cells, column, row, bool(rng.random() < 0.5))


def _beside(rng: np.random.Generator, chosen: list[Subject], relation: str) -> list[Figure]:
    dx, dy = RELATIONS[relation]
    made = []
    for subject, way in zip(chosen, (1, -1), strict=True):
        # Each fills its own half along the relation, and lies about the middle across it.
        along = CELLS - PAIR_SIZE if (dx or dy) * way > 0 else 0
        middle = (CELLS - PAIR_SIZE) // 2
        across = int(rng.integers(middle - 1, middle + 2))
        column, row = (along, across) if dx else (across, along)
        made.append(_figure(rng, subject, PAIR_SIZE, column, row))
    return made


@cache
def _ground(background: Background, side: int) -> Image.Image:
    first = np.array(COLOURS[background.first], np.float32)
    second = np.array(COLOURS[background.second or background.first], np.float32)
    share = (np.arange(side, dtype=np.float32) + 0.5) / side
    if background.kind == "halves":
        share = (share > 0.5).astype(np.float32)
    line = first + share[:, None] * (second - first)
    square = np.repeat(line[:, None] if background.upright else line[None], side, 1 if background.upright else 0)
    return Image.fromarray(square.round().astype(np.uint8), "RGB").convert("RGBA")


def render(what: Scene, side: int = SIDE) -> Image.Image:
    """The RGB picture of a scene, `side` × `side` pixels."""
    canvas = _ground(what.background, side).copy()
    for figure in what.figures:
        room = figure.cells * side // CELLS
        picture = _scaled(figure, room)
        canvas.paste(picture, (figure.column * side // CELLS, figure.row * side // CELLS), picture)
    return canvas.convert("RGB")


def _scaled(figure: Figure, room: int) -> Image.Image:
    """A drawing, mirrored or not, `room` pixels wide.

    Scaled premultiplied: otherwise the colours of transparent pixels bleed into the edges.
    """
    picture = drawing(figure.subject.name, figure.look).convert("RGBa")
    if figure.mirrored:
        picture = ImageOps.mirror(picture)
    return picture.resize((room, room), Image.Resampling.LANCZOS).convert("RGBA")
