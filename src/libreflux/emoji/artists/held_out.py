"""What no training picture of the family shows: some subjects, some by one artist, some places with sizes.

Every scene is of one kind; `training_scene` draws only those of none, `held_out_scene` only those of a kind.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Literal

from libreflux import seeding
from libreflux.emoji.artists import captions
from libreflux.emoji.artists.captions import Told
from libreflux.emoji.artists.scenes import CELLS, PAIRS, SIZES, Background, Figure, Scene, render, scene
from libreflux.emoji.artists.subjects import subjects, unseen_subjects
from libreflux.emoji.compose import COLOURS
from libreflux.emoji.folders import write_captioned

Kind = Literal["subject", "look", "place"]
KINDS: tuple[Kind, ...] = ("subject", "look", "place")

LOOKS_HELD_OUT = 0.5  # of the subjects, one look each
MEASURED_SEED = 71
LOOK_TOLD = 0.5  # of the prompts
HELD_OUT_CELLS = 0.15  # of each subject's places and sizes


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
    """(column, row, side) of a figure, in cells."""
    return figure.column, figure.row, figure.cells


@cache
def held_out_cells(subject: str) -> frozenset[tuple[int, int, int]]:
    """The places and sizes in which no training picture shows this subject alone."""
    every = [
        (column, row, cells)
        for cells in SIZES.values()
        for column, row in itertools.product(range(CELLS - cells + 1), repeat=2)
    ]
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


def training_draw(seed: int, index: int, *, pairs: float = PAIRS) -> tuple[int, Scene]:
    """(its own index, the scene) of `training_scene`: `scenes.scene` of the seed and that index gives it at once."""
    for turn in itertools.count():
        found = scene(seed, index * 64 + turn, pairs=pairs)
        if kind_of(found) is None:
            return index * 64 + turn, found
    raise AssertionError


def training_scene(seed: int, index: int, *, pairs: float = PAIRS) -> Scene:
    """The scene of (seed, index) of a training set: the first of its draws that is not held out."""
    return training_draw(seed, index, pairs=pairs)[1]


def held_out_scene(kind: Kind, seed: int, index: int, *, pairs: float = 0.0) -> Scene:
    """The scene of (seed, index) among those that are held out for this reason."""
    pool = unseen_subjects() if kind == "subject" else subjects()
    for turn in itertools.count():
        found = scene(seed, index * 4096 + turn, pairs=pairs, pool=pool)
        if kind_of(found) == kind:
            return found
    raise AssertionError


def subject_names() -> tuple[str, ...]:
    """Every subject of the family that its models were shown."""
    return tuple(subject.name for subject in subjects())


def measured_scenes(count: int) -> list[Scene]:
    """`count` held-out scenes of one subject, by look and by place in turn; a longer list begins with a shorter one."""
    reasons: tuple[Kind, ...] = ("look", "place")
    return [held_out_scene(reasons[index % 2], MEASURED_SEED, index) for index in range(count)]


def write_held_out(folder: Path, count: int) -> Path:
    """Writes `count` held-out pictures with captions that tell some facts, see `write_captioned`."""
    measured = measured_scenes(count)
    texts = [captions.phrase(what, captions.told_by(what, "short")) for what in measured]
    return write_captioned(folder, texts, lambda number: render(measured[number]))


def prompts(count: int) -> list[str]:
    """`count` prompts "a SUBJECT on COLOUR", half of them with a look that the subject was shown in.

    Every subject comes before any twice; a longer list begins with these.
    """
    pool, colours = subjects(), list(COLOURS)
    found = []
    for index in range(count):
        turn, place = divmod(index, len(pool))
        subject = pool[seeding.rng(0, "artists-probe-subjects", turn).permutation(len(pool))[place]]
        rng = seeding.rng(0, "artists-probe-prompt", index)
        looks = [look for look in subject.looks if look != held_out_looks().get(subject.name)]
        figure = Figure(subject, looks[rng.integers(len(looks))], SIZES["medium"], 1, 1)
        what = Scene((figure,), Background(colours[rng.integers(len(colours))]))
        found.append(captions.phrase(what, Told(look=bool(rng.random() < LOOK_TOLD), background=True)))
    return found
