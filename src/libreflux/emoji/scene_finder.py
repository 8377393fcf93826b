"""Which scene of the family's training a measured picture shows, moved by how many pixels: by its very pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from libreflux.emoji import compose, held_out
from libreflux.emoji.build.base import layouts
from libreflux.emoji.compose import COLOURS, Scene
from libreflux.probing.judges import COLOUR, SUBJECT
from libreflux.probing.subjects import parse_prompt
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene

REACH = 3
"""Pixels along each axis by which a scene is looked for."""


def find_scene(picture: MeasuredPicture) -> NearestScene | None:
    """The scene of one subject that a picture shows: all of them were trained on, so the distance is how far it moved.

    Returns:
        None for a picture that is no such scene, unmoved or moved by `REACH` pixels at most along each axis.
    """
    if picture.pixels.shape != (compose.SIDE, compose.SIDE, 3):
        return None
    named = parse_prompt(picture.caption, {SUBJECT: held_out.subject_names(), COLOUR: list(COLOURS)})
    if named.subject is None or named.colour is None:
        return None
    subject = next(one for one in compose.subjects() if one.name == named.subject)
    for size, place in layouts():
        scene = Scene(subject, named.colour, size, place)
        rendered = np.asarray(compose.render(scene))
        for across, down in _shifts():
            if _is_moved(picture.pixels, rendered, across, down):
                moved = max(abs(across), abs(down))
                told = f"{picture.caption}, {size}, {place}" + (f", moved by {across}, {down} pixels" if moved else "")
                return NearestScene(told, float(moved), seen=not moved, picture=compose.render(scene))
    return None


def _shifts() -> Iterator[tuple[int, int]]:
    """The least first."""
    every = [(x, y) for x in range(-REACH, REACH + 1) for y in range(-REACH, REACH + 1)]
    yield from sorted(every, key=lambda one: (max(map(abs, one)), one))


def _is_moved(pixels: np.ndarray, rendered: np.ndarray, across: int, down: int) -> bool:
    """Whether a picture is another one, moved; what comes in at the edges is not compared."""
    ours, theirs = [slice(None)] * 2, [slice(None)] * 2
    for axis, by in enumerate((down, across)):
        ours[axis], theirs[axis] = slice(max(by, 0), min(by, 0) or None), slice(max(-by, 0), min(-by, 0) or None)
    one, other = pixels[tuple(ours)], rendered[tuple(theirs)]
    middle = len(one) // 2
    return np.array_equal(one[middle], other[middle]) and np.array_equal(one, other)
