"""What is held out is never trained on, and there is enough of it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from libreflux.emoji.artists import captions, held_out, judge, scenes
from libreflux.emoji.artists.subjects import subjects, unseen_subjects
from libreflux.probing.subjects import parse_prompt


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
    every = sum((scenes.CELLS - cells + 1) ** 2 for cells in scenes.SIZES.values())
    shares = [len(held_out.held_out_cells(subject.name)) / every for subject in subjects()]
    assert 0.1 < min(shares) <= max(shares) < 0.2


def test_a_scene_of_an_unseen_subject_is_one_in_a_pair_too() -> None:
    pool = (*unseen_subjects()[:1], *subjects()[:1])
    assert held_out.kind_of(scenes.scene(1, 0, pairs=1.0, pool=pool)) == "subject"


def test_measured_pictures_are_held_out_and_a_longer_list_begins_with_a_shorter(tmp_path: Path) -> None:
    measured = held_out.measured_scenes(8)
    assert [held_out.kind_of(what) for what in measured] == ["look", "place"] * 4
    assert held_out.measured_scenes(4) == measured[:4]
    folder = held_out.write_held_out(tmp_path / "pictures", 3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == [captions.captions(what)["short"] for what in measured[:3]]
    stamp = (folder / "metadata.jsonl").stat().st_mtime_ns
    held_out.write_held_out(folder, 3)
    assert (folder / "metadata.jsonl").stat().st_mtime_ns == stamp


def test_prompts_name_each_subject_once_before_any_twice_and_no_look_that_is_held_out() -> None:
    names, prompts = held_out.subject_names(), held_out.prompts(80)
    assert held_out.prompts(10) == prompts[:10]
    asked = judge.questions()
    read = [parse_prompt(text, asked) for text in prompts]
    assert sorted(str(one.subject) for one in read[: len(names)]) == sorted(names)
    assert all(one.colour for one in read)
    assert not any("place" in one.named or "size" in one.named for one in read)
    pair = parse_prompt("a fox left of a star, on blue", asked).named
    assert "place" not in pair
    looks = [(str(one.subject), one.named["look"]) for one in read if "look" in one.named]
    assert 20 < len(looks) < 60
    assert not set(looks) & set(held_out.held_out_looks().items())
