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

SMALLEST, LARGEST = 0.4, 0.92  # side of a lone subject over the side of the picture
SMALL_BELOW, LARGE_ABOVE = 0.52, 0.72
OFF_CENTRE = 0.09  # of the side: from here on a place is "left", not "in the centre"
MARGIN = 0.02
PAIR_SIZES = (0.4, 0.46)
TURN, MOST_TURN = 5.0, 10.0  # degrees: standard deviation and most
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # from the second to the first
BORDER = 16  # pixels around a drawing of `SIDE`, for the corners of a turned one
KINDS = {"plain": 0.6, "gradient": 0.2, "halves": 0.2}
PAIRS = 0.2


@dataclass(frozen=True)
class Figure:
    """One subject in a picture. `side`, `x`, `y`: its size and centre, in sides of the picture; `turn`: degrees."""

    subject: Subject
    look: str
    side: float
    x: float
    y: float
    mirrored: bool = False
    turn: float = 0.0

    @property
    def size(self) -> str:
        """small, medium or large."""
        return "small" if self.side < SMALL_BELOW else "large" if self.side > LARGE_ABOVE else "medium"

    @property
    def place(self) -> str:
        """centre, left, right, top, bottom, or two of them: "top left"."""
        across = _word(self.x - 0.5, "left", "right")
        down = _word(self.y - 0.5, "top", "bottom")
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
        side = float(rng.uniform(SMALLEST, LARGEST))
        x, y = (float(rng.uniform(MARGIN + side / 2, 1 - MARGIN - side / 2)) for _ in range(2))
        return Scene((_figure(rng, chosen[0], side, x, y),), behind)
    relation = str(rng.choice(list(RELATIONS)))
    return Scene(tuple(_beside(rng, chosen, relation)), behind, relation)


def _background(rng: np.random.Generator) -> Background:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    first, second = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    upright = bool(rng.random() < 0.5)
    return Background(first) if kind == "plain" else Background(first, second, kind, upright)


def _figure(rng: np.random.Generator, subject: Subject, side: float, x: float, y: float) -> Figure:
    look = subject.looks[rng.integers(len(subject.looks))]
    turn = float(np.clip(rng.normal(0, TURN), -MOST_TURN, MOST_TURN))
    return Figure(subject, look, side, x, y, bool(rng.random() < 0.5), turn)


def _beside(rng: np.random.Generator, chosen: list[Subject], relation: str) -> list[Figure]:
    dx, dy = RELATIONS[relation]
    made = []
    for subject, way in zip(chosen, (1, -1), strict=True):
        side = float(rng.uniform(*PAIR_SIZES))
        # Each keeps to its own half along the relation, and lies anywhere across it.
        near, far = MARGIN + side / 2, 0.5 - side / 2
        along = 0.5 + way * (0.5 - float(rng.uniform(near, far)))
        against = 1 - along
        across = float(rng.uniform(0.5 - 0.12, 0.5 + 0.12))
        x = (along if dx > 0 else against) if dx else across
        y = (along if dy > 0 else against) if dy else across
        made.append(_figure(rng, subject, side, x, y))
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
        picture = _turned(figure)
        room = max(1, round(figure.side * side * picture.width / SIDE))
        picture = picture.resize((room, room), Image.Resampling.LANCZOS).convert("RGBA")
        canvas.paste(picture, (round(figure.x * side - room / 2), round(figure.y * side - room / 2)), picture)
    return canvas.convert("RGB")


def _turned(figure: Figure) -> Image.Image:
    """A drawing mirrored and turned, with room for its corners, premultiplied.

    Otherwise the colours of transparent pixels bleed into the edges when it is scaled.
    """
    picture = drawing(figure.subject.name, figure.look).convert("RGBa")
    if figure.mirrored:
        picture = ImageOps.mirror(picture)
    roomy = Image.new("RGBa", (SIDE + 2 * BORDER, SIDE + 2 * BORDER))
    roomy.paste(picture, (BORDER, BORDER))
    return roomy.rotate(figure.turn, Image.Resampling.BICUBIC)
