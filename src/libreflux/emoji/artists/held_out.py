"""What no training picture of the family shows: some subjects, some by one artist, some places with sizes.

Every scene is of one kind; `training_scene` draws only those of none, `held_out_scene` only those of a kind.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Literal

from libreflux import seeding
from libreflux.emoji.artists.scenes import PAIRS, Figure, Scene, scene
from libreflux.emoji.artists.subjects import subjects, unseen_subjects

Kind = Literal["subject", "look", "place"]
KINDS: tuple[Kind, ...] = ("subject", "look", "place")

LOOKS_HELD_OUT = 0.5  # of the subjects, one look each
CELLS, HELD_OUT_CELLS = 5, 0.12  # places and sizes: so many steps each way, and the share kept out for each subject


@cache
def held_out_looks() -> dict[str, str]:
    """Subject → the look in which no training picture shows it; for half of the subjects."""
    names = [subject.name for subject in subjects()]
    order = seeding.rng(0, "held-out-looks").permutation(len(names))[: round(len(names) * LOOKS_HELD_OUT)]
    looks = {subject.name: subject.looks for subject in subjects()}
    return {
        names[i]: looks[names[i]][seeding.rng(0, "held-out-look", names[i]).integers(len(looks[names[i]]))]
        for i in order
    }


def cell(figure: Figure) -> tuple[int, int, int]:
    """(column, row, size) of a figure, `CELLS` steps each: of its free room across and down, and of the sizes."""
    from libreflux.emoji.artists.scenes import LARGEST, MARGIN, SMALLEST

    def step(share: float) -> int:
        return max(0, min(CELLS - 1, int(share * CELLS)))

    low, room = MARGIN + figure.side / 2, 1 - 2 * MARGIN - figure.side
    across, down = ((value - low) / room if room > 0 else 0.5 for value in (figure.x, figure.y))
    return step(across), step(down), step((figure.side - SMALLEST) / (LARGEST - SMALLEST))


@cache
def held_out_cells(subject: str) -> frozenset[tuple[int, int, int]]:
    """The places and sizes in which no training picture shows this subject alone."""
    every = list(itertools.product(range(CELLS), repeat=3))
    order = seeding.rng(0, "held-out-cells", subject).permutation(len(every))
    return frozenset(every[i] for i in order[: round(len(every) * HELD_OUT_CELLS)])


def kind_of(what: Scene) -> Kind | None:
    """Why nothing is trained on this scene; None: it may be trained on."""
    names = {subject.name for subject in unseen_subjects()}
    if any(figure.subject.name in names for figure in what.figures):
        return "subject"
    if any(held_out_looks().get(figure.subject.name) == figure.look for figure in what.figures):
        return "look"
    alone = what.figures[0]
    if what.relation is None and cell(alone) in held_out_cells(alone.subject.name):
        return "place"
    return None


def training_scene(seed: int, index: int, *, pairs: float = PAIRS) -> Scene:
    """The scene of (seed, index) of a training set: the first of its draws that is not held out."""
    for turn in itertools.count():
        found = scene(seed, index * 64 + turn, pairs=pairs)
        if kind_of(found) is None:
            return found
    raise AssertionError


def held_out_scene(kind: Kind, seed: int, index: int, *, pairs: float = 0.0) -> Scene:
    """The scene of (seed, index) among those that are held out for this reason."""
    pool = unseen_subjects() if kind == "subject" else subjects()
    for turn in itertools.count():
        found = scene(seed, index * 4096 + turn, pairs=pairs, pool=pool)
        if kind_of(found) == kind:
            return found
    raise AssertionError
