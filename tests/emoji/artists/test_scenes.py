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
        along = dx * (first.column - second.column) + dy * (first.row - second.row)
        assert along >= first.cells == second.cells == scenes.PAIR_SIZE


def test_words_follow_the_numbers() -> None:
    figure = Figure(STAR, "flat", 4, 0, 1)
    assert (figure.size, figure.place) == ("small", "top left")
    assert dataclasses.replace(figure, column=2).place == "top"
    assert dataclasses.replace(figure, row=2).place == "left"
    assert dataclasses.replace(figure, column=3, row=4).place == "bottom right"
    medium, large = Figure(STAR, "flat", 5, 1, 3), Figure(STAR, "flat", 7, 1, 0)
    assert (medium.size, medium.place) == ("medium", "bottom")
    assert (large.size, large.place) == ("large", "centre")


def test_every_figure_lies_within_the_picture() -> None:
    figures = [figure for index in range(500) for figure in scenes.scene(4, index).figures]
    assert min(min(figure.column, figure.row) for figure in figures) == 0
    assert max(max(figure.column, figure.row) + figure.cells for figure in figures) == scenes.CELLS
    assert {figure.size for figure in figures} == set(scenes.SIZES)


@pytest.mark.parametrize(("cells", "column", "row"), [(4, 0, 0), (4, 4, 2), (5, 1, 3), (7, 1, 0)])
def test_a_figure_is_drawn_where_it_says(cells: int, column: int, row: int) -> None:
    figure = Figure(STAR, "flat", cells, column, row)
    picture = np.asarray(scenes.render(Scene((figure,), Background("blue"))), np.int64)
    rows, columns = np.nonzero(np.abs(picture - COLOURS["blue"]).sum(-1) > 60)
    x, y = figure.centre
    assert columns.mean() / 128 == pytest.approx(x, abs=0.03)
    assert rows.mean() / 128 == pytest.approx(y, abs=0.03)
    assert column * 16 <= columns.min() < columns.max() < (column + cells) * 16


def test_the_same_drawing_elsewhere_has_the_same_pixels() -> None:
    """Places are whole image tokens, so that these too are only moved."""
    one, other = (np.asarray(scenes.render(Scene((Figure(STAR, "3d", 4, c, 2),), Background("red")))) for c in (0, 3))
    assert (one[:, :64] == other[:, 48:112]).all()


def test_backgrounds_are_what_they_say() -> None:
    figure = Figure(STAR, "flat", 4, 2, 3)

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
    left = Figure(STAR, "retro", 5, 1, 1)
    plain, turned = (
        np.asarray(scenes.render(Scene((dataclasses.replace(left, mirrored=m),), Background("green"))))[:, 16:96]
        for m in (False, True)
    )
    assert np.abs(plain[:, ::-1].astype(int) - turned).mean() < 3
