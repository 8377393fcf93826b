"""The grammar: every caption is true, and tells no more than it was to tell."""

import pytest

from libreflux.emoji.artists import captions, held_out, scenes
from libreflux.emoji.artists.captions import ALL, Told
from libreflux.emoji.artists.scenes import Background, Figure, Scene
from libreflux.emoji.artists.subjects import all_subjects
from libreflux.emoji.compose import COLOURS

BY_NAME = {subject.name: subject for subject in all_subjects()}


def alone(name: str) -> Scene:
    return Scene((Figure(BY_NAME[name], "flat", 4, 0, 0),), Background("orange", "blue", "gradient"))


def test_a_bare_caption_has_the_subject_alone() -> None:
    assert captions.captions(alone("fox"))["bare"] == "a fox"
    assert captions.captions(alone("apple"))["bare"] == "an apple"
    assert captions.captions(alone("scissors"))["bare"] == "scissors"
    assert captions.captions(alone("sun"))["bare"] == "the sun"


def test_a_full_caption_has_every_fact() -> None:
    found = captions.captions(alone("fox"))["full"]
    assert found == "a small flat fox at the top left, on an orange to blue gradient"


def test_a_fact_that_is_not_told_is_not_there() -> None:
    assert captions.phrase(alone("fox"), Told(size=True)) == "a small fox"
    assert captions.phrase(alone("fox"), Told(background=True)) == "a fox on an orange to blue gradient"
    assert captions.phrase(alone("fox"), Told(place=True)) == "a fox at the top left"


def test_a_pair_tells_its_relation_always() -> None:
    what = scenes.scene(5, 0, pairs=1.0)
    first, second = (figure.subject.name for figure in what.figures)
    bare = captions.captions(what)["bare"]
    assert f" {what.relation} " in bare
    assert bare.index(first) < bare.rindex(second)


def test_short_captions_tell_by_chance_and_the_same_every_time() -> None:
    found = [captions.captions(held_out.training_scene(0, index)) for index in range(300)]
    assert found == [captions.captions(held_out.training_scene(0, index)) for index in range(300)]
    assert 0.02 < sum(one["short"] == one["bare"] for one in found) / 300 < 0.25
    assert sum(one["short"] == one["full"] for one in found) > 10


@pytest.mark.parametrize("kind", ["full", "long"])
def test_every_fact_of_a_scene_is_in_its_long_captions(kind: str) -> None:
    for index in range(100):
        what = held_out.training_scene(7, index)
        told = captions.captions(what)[kind]
        words = [figure.subject.name for figure in what.figures] + [figure.look for figure in what.figures]
        words += [colour for colour in (what.background.first, what.background.second) if colour]
        words += [what.relation] if what.relation else [what.figures[0].size, what.figures[0].place]
        assert [word for word in words if word not in told] == []


def test_no_caption_names_a_colour_that_is_not_there() -> None:
    for index in range(100):
        what = held_out.training_scene(8, index)
        there = {what.background.first, what.background.second}
        others = {colour for colour in COLOURS if colour not in there}
        told = captions.phrase(what, ALL)
        assert [colour for colour in others if f" {colour}" in told] == []
