"""A planted training scene is found by its pixels; what is held out is near to one, and a stranger is nobody's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libreflux.emoji.artists import captions, held_out, scenes, training_scenes
from libreflux.emoji.artists.scene_finder import find_scene, ground_of
from libreflux.emoji.artists.scenes import Scene
from libreflux.emoji.artists.training_scenes import TrainingScenes
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TrainingScenes:
    """The first 300 scenes of one training set and 50 of another, written and read back."""
    file = tmp_path_factory.mktemp("index") / "scenes.npz"
    alone = training_scenes.listed(4, 50, lambda what: what.relation is None)
    return training_scenes.read(training_scenes.write([training_scenes.listed(3, 300), alone], file))


def found(what: Scene, index: TrainingScenes, picture: Image.Image | None = None) -> NearestScene | None:
    pixels = np.asarray(scenes.render(what) if picture is None else picture)
    return find_scene(MeasuredPicture("0" * 32, Path("a.png"), captions.phrase(what, captions.ALL), pixels), index)


def test_the_index_gives_the_scenes_back(index: TrainingScenes) -> None:
    assert len(index) == 350
    first = held_out.training_scene(3, 0)
    for figure in first.figures:
        assert first in list(index.with_subject(figure.subject.name))
        ground = training_scenes.ground_number(first.background)
        assert first in list(index.with_subject(figure.subject.name, ground))
        assert first not in list(index.with_subject(figure.subject.name, ground + 1))


def test_a_planted_scene_is_found_and_one_that_is_held_out_is_not(index: TrainingScenes) -> None:
    for number in (0, 17, 299):
        what = held_out.training_scene(3, number)
        planted = found(what, index)
        assert planted is not None
        assert (planted.seen, planted.distance, planted.name) == (True, 0.0, captions.phrase(what, captions.ALL))
    for what in held_out.measured_scenes(6):
        near = found(what, index)
        assert near is not None
        assert not near.seen
        assert near.distance > 0.5


def test_a_stranger_is_nobodys(index: TrainingScenes) -> None:
    what = held_out.training_scene(3, 0)
    grey = Image.fromarray(np.asarray(scenes.render(what)) // 2)
    assert found(what, index, grey) is None
    assert found(what, index, scenes.render(what).resize((64, 64))) is None
    pixels = np.asarray(scenes.render(what))
    assert find_scene(MeasuredPicture("0" * 32, Path("a.png"), "a bicycle on blue", pixels), index) is None


def test_every_background_is_known_behind_whatever_stands_before_it() -> None:
    numbers: dict[int, set[bytes]] = {}
    for index in range(300):
        what = scenes.scene(9, index)
        empty = np.asarray(scenes.render(Scene((), what.background)))
        number = training_scenes.ground_number(what.background)
        assert ground_of(np.asarray(scenes.render(what))) == number
        numbers.setdefault(number, set()).add(empty.tobytes())
    assert {len(looks) for looks in numbers.values()} == {1}
