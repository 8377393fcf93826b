"""What is held out is never trained on, and there is enough of it."""

from collections import Counter

import pytest

from libreflux.emoji.artists import held_out, scenes
from libreflux.emoji.artists.subjects import subjects, unseen_subjects


def test_no_training_scene_is_held_out() -> None:
    kinds = Counter(held_out.kind_of(held_out.training_scene(3, index)) for index in range(2000))
    assert kinds == {None: 2000}


@pytest.mark.parametrize("kind", held_out.KINDS)
def test_held_out_scenes_are_of_their_kind(kind: held_out.Kind) -> None:
    found = [held_out.held_out_scene(kind, 1, index) for index in range(50)]
    assert {held_out.kind_of(what) for what in found} == {kind}
    assert found == [held_out.held_out_scene(kind, 1, index) for index in range(50)]


def test_pairs_can_be_held_out_too() -> None:
    found = held_out.held_out_scene("look", 1, 0, pairs=1.0)
    assert found.relation is not None


def test_a_part_of_all_scenes_is_held_out() -> None:
    kinds = Counter(held_out.kind_of(scenes.scene(9, index)) for index in range(2000))
    assert 0.04 < kinds["look"] / 2000 < 0.15
    assert 0.05 < kinds["place"] / 2000 < 0.15


def test_every_subject_keeps_four_artists_and_most_places() -> None:
    left = [set(subject.looks) - {held_out.held_out_looks().get(subject.name)} for subject in subjects()]
    assert min(map(len, left)) >= 4
    shares = [len(held_out.held_out_cells(subject.name)) / held_out.CELLS**3 for subject in subjects()]
    assert max(shares) < 0.13


def test_the_smallest_and_largest_figures_have_a_cell() -> None:
    for index in range(500):
        figure = scenes.scene(11, index, pairs=0.0).figures[0]
        assert all(0 <= step < held_out.CELLS for step in held_out.cell(figure))


def test_a_scene_of_an_unseen_subject_is_one_in_a_pair_too() -> None:
    pool = (*unseen_subjects()[:1], *subjects()[:1])
    assert held_out.kind_of(scenes.scene(1, 0, pairs=1.0, pool=pool)) == "subject"
