"""The training scene of the artists' family that is nearest to a measured picture, by their pixels."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from libreflux.emoji.artists import captions, scenes, training_scenes
from libreflux.emoji.artists.scenes import KINDS, Background, Scene
from libreflux.emoji.artists.subjects import SIDE, all_subjects
from libreflux.emoji.artists.training_scenes import TrainingScenes
from libreflux.emoji.compose import COLOURS
from libreflux.probing.subjects import find_name
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene

STRIDE = 4
LEAST_GROUND = 0.15  # of a picture that must be the background's, to the bit
MOST = 100
"""Scenes of a subject that are drawn to be compared, where none has the picture's background."""


def find_scene(picture: MeasuredPicture, index: TrainingScenes | None = None) -> NearestScene | None:
    """The nearest scene with the subject that the caption names, on the picture's own background.

    The distance is the mean absolute difference of their pixels, of 255; where no training scene of that subject has
    that background, of the first `MOST` on others.

    Args:
        index: of the training scenes; None: the family's own.

    Returns:
        None for a picture that the family has not composed: of another size, without a known subject, or on a
        background that the family does not draw.
    """
    if picture.pixels.shape != (SIDE, SIDE, 3):
        return None
    name = find_name(picture.caption, [subject.name for subject in all_subjects()])
    ground = ground_of(picture.pixels)
    if name is None or ground is None:
        return None
    known = training_scenes.read() if index is None else index
    found = list(known.with_subject(name, ground)) or list(itertools.islice(known.with_subject(name), MOST))
    if not found:
        return None
    apart = [_difference(picture.pixels, what) for what in found]
    best = int(np.argmin(apart))
    told = captions.phrase(found[best], captions.ALL)
    return NearestScene(told, apart[best], seen=apart[best] == 0, picture=scenes.render(found[best]))


def _difference(pixels: np.ndarray, what: Scene) -> float:
    return float(np.abs(pixels.astype(np.int16) - np.asarray(scenes.render(what))).mean())


def ground_of(pixels: np.ndarray) -> int | None:
    """The number of the background that most pixels of a picture are of; None where too few are of any."""
    numbers, every = _grounds()
    shown = (every == pixels[::STRIDE, ::STRIDE]).all(axis=-1).mean(axis=(1, 2))
    best = int(np.argmax(shown))
    return numbers[best] if shown[best] >= LEAST_GROUND else None


@cache
def _grounds() -> tuple[list[int], np.ndarray]:
    """The numbers of all N backgrounds, and every `STRIDE`-th pixel of each, [N, H, W, 3] uint8."""
    numbers, pixels = [], []
    for kind, first, second, upright in itertools.product(KINDS, COLOURS, COLOURS, (True, False)):
        if (first == second and upright) if kind == "plain" else first != second:
            ground = Background(first, None if kind == "plain" else second, kind, upright)
            numbers.append(training_scenes.ground_number(ground))
            pixels.append(np.asarray(scenes.render(Scene((), ground)))[::STRIDE, ::STRIDE])
    return numbers, np.stack(pixels)
