"""Scenes: functions of their index, true to what they say, drawn where they say."""

import dataclasses

import numpy as np
import pytest

from libreflux.emoji.artists import scenes
from libreflux.emoji.artists.scenes import Background, Figure, Scene
from libreflux.emoji.artists.subjects import LOOKS, all_subjects, drawing, subjects, unseen_subjects
from libreflux.emoji.compose import COLOURS

STAR = next(subject for subject in subjects() if subject.name == "star")


def test_eighty_subjects_or_more_are_drawn_by_five_artists_or_more() -> None:
    assert len(all_subjects()) >= 80
    assert len(subjects()) == 40
    assert min(len(subject.looks) for subject in all_subjects()) >= 5
    assert len(unseen_subjects()) == 51


@pytest.mark.parametrize("look", LOOKS)
def test_every_drawing_is_one(look: str) -> None:
    drawn = [drawing(subject.name, look) for subject in all_subjects() if look in subject.looks]
    filled = [np.asarray(picture)[..., 3].mean() / 255 for picture in drawn]
    assert min(filled) > 0.1


def test_a_drawing_that_no_artist_made_is_refused() -> None:
    lacks = next(subject for subject in all_subjects() if len(subject.looks) < 6)
    missing = next(look for look in LOOKS if look not in lacks.looks)
    with pytest.raises(KeyError):
        drawing(lacks.name, missing)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    first = [scenes.scene(1, index) for index in range(20)]
    assert first == [scenes.scene(1, index) for index in range(20)]
    assert first != [scenes.scene(2, index) for index in range(20)]


def test_two_subjects_stand_as_their_relation_says_and_do_not_overlap() -> None:
    for index in range(200):
        what = scenes.scene(3, index, pairs=1.0)
        first, second = what.figures
        dx, dy = scenes.RELATIONS[what.relation or ""]
        along = dx * (first.x - second.x) + dy * (first.y - second.y)
        assert along >= (first.side + second.side) / 2


def test_words_follow_the_numbers() -> None:
    figure = Figure(STAR, "flat", 0.4, 0.3, 0.2)
    assert (figure.size, figure.place) == ("small", "top left")
    assert dataclasses.replace(figure, side=0.9, x=0.5, y=0.5).size == "large"
    assert dataclasses.replace(figure, x=0.5, y=0.5).place == "centre"


@pytest.mark.parametrize(("x", "y", "turn"), [(0.3, 0.3, 0.0), (0.7, 0.4, 12.0), (0.5, 0.72, -12.0)])
def test_a_figure_is_drawn_where_it_says(x: float, y: float, turn: float) -> None:
    behind = Background("blue")
    picture = np.asarray(scenes.render(Scene((Figure(STAR, "flat", 0.4, x, y, False, turn),), behind)), np.int64)
    drawn = np.abs(picture - COLOURS["blue"]).sum(-1) > 60
    rows, columns = np.nonzero(drawn)
    assert columns.mean() / 128 == pytest.approx(x, abs=0.03)
    assert rows.mean() / 128 == pytest.approx(y, abs=0.03)


def test_backgrounds_are_what_they_say() -> None:
    figure = Figure(STAR, "flat", 0.4, 0.5, 0.5)

    def corners(background: Background) -> list[tuple[int, ...]]:
        picture = np.asarray(scenes.render(Scene((figure,), background)))
        return [tuple(int(v) for v in picture[row, column]) for row, column in ((0, 0), (0, 127), (127, 0))]

    red, white = COLOURS["red"], COLOURS["white"]
    assert corners(Background("red")) == [red, red, red]
    assert corners(Background("red", "white", "halves", True)) == [red, red, white]
    assert corners(Background("red", "white", "halves", False)) == [red, white, red]
    upright = corners(Background("red", "white", "gradient", True))
    assert np.abs(np.subtract(upright, [red, red, white])).max() <= 2


def test_a_mirrored_figure_is_the_mirror_image() -> None:
    left = Figure(STAR, "retro", 0.6, 0.5, 0.5)
    plain, turned = (
        np.asarray(scenes.render(Scene((dataclasses.replace(left, mirrored=m),), Background("green"))))
        for m in (False, True)
    )
    assert np.abs(plain[:, ::-1].astype(int) - turned).mean() < 3
