"""A planted picture of the family's training is found, and so is one that was only moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from libreflux.emoji import compose
from libreflux.emoji.compose import Scene
from libreflux.emoji.held_out import SHIFT, held_out_scenes, moved
from libreflux.emoji.scene_finder import find_scene
from libreflux.probing.trained import Neighbour, PictureCheck, TrainingCheck
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene


def found(picture: Image.Image, what: Scene) -> NearestScene | None:
    pixels = np.asarray(picture.convert("RGB"))
    return find_scene(MeasuredPicture("0" * 32, Path("a.png"), compose.short_caption(what), pixels))


def checked(scenes: list[NearestScene | None]) -> TrainingCheck:
    rows = [
        PictureCheck(
            id=str(number),
            name=f"{number}.png",
            seen="scene" if one is not None and one.seen else None,
            scene=None if one is None else Neighbour(name=one.name, distance=one.distance),
        )
        for number, one in enumerate(scenes)
    ]
    return TrainingCheck(rows=rows, sets=[], scenes=True)


def test_the_pictures_of_a_probe_are_training_scenes_that_were_moved() -> None:
    scenes = held_out_scenes(6)
    near = [found(moved(what, index), what) for index, what in enumerate(scenes)]
    assert all(one is not None and 1 <= one.distance <= SHIFT and not one.seen for one in near)
    check = checked(near)
    assert check.held_out is None
    assert check.remark == "6 of 6 pictures show a scene that was trained on, moved by 2 pixels at most"


def test_a_planted_training_scene_is_not_held_out_and_a_stranger_is_not_known() -> None:
    what = Scene(compose.subjects()[3], "blue", "small", "left")
    planted = found(compose.render(what), what)
    assert planted is not None
    assert (planted.seen, planted.distance) == (True, 0)
    assert planted.picture is not None
    assert checked([planted]).held_out is False
    assert checked([planted]).remark == "not held out: 1 of 1 picture was trained on"
    turned = compose.render(what).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert found(turned, what) is None
    assert checked([None]).held_out is None
