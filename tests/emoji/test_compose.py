"""The composer: deterministic, and its captions true of what was composed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux.data.sources import read_source
from libreflux.emoji import compose
from libreflux.emoji.compose import COLOURS, LOOKS, Scene, captions, render, scene, subjects
from libreflux.recipe import DataSource


def test_enough_subjects_with_plain_distinct_names_and_small_pictures() -> None:
    names = [subject.name for subject in subjects()]
    assert 150 <= len(names) <= 300
    assert len(set(names)) == len(names)
    assert all(1 <= len(name.split()) <= 2 and name == name.lower() for name in names)
    assert sum(path.stat().st_size for path in compose.PICTURES.iterdir()) <= 2 * 2**20
    for subject in subjects():
        with Image.open(compose.PICTURES / subject.file) as picture:
            assert picture.size == (128, 128)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert [scene(3, i) for i in range(50)] == [scene(3, i) for i in range(50)]
    assert [scene(3, i) for i in range(50)] != [scene(4, i) for i in range(50)]
    assert render(scene(3, 7)).tobytes() == render(scene(3, 7)).tobytes()


def test_pairs_follow_their_share() -> None:
    assert all(scene(0, i, pairs=0.0).second is None for i in range(100))
    assert all(scene(0, i, pairs=1.0).second is not None for i in range(100))
    share = sum(scene(0, i).second is not None for i in range(2000)) / 2000
    assert abs(share - 0.2) < 0.04  # 4.5 standard errors


@pytest.mark.parametrize("index", range(0, 60, 3))
def test_captions_name_what_is_there(index: int) -> None:
    what = scene(5, index)
    for text in captions(what).values():
        assert what.subject.name in text
        assert what.colour in text
        if what.second is not None and what.relation is not None:
            assert what.second.name in text
            assert what.relation in text
    assert 30 <= len(captions(what)["long"].split()) <= 150


@pytest.mark.parametrize("relation", list(compose.RELATIONS))
def test_relations_are_where_the_caption_says(relation: str) -> None:
    one, other = subjects()[0], subjects()[40]
    canvas = np.asarray(render(Scene(one, "white", "medium", "centre", relation, other)), np.int16)
    alone = {}
    for name, (first, second) in {"first": (one, other), "swapped": (other, one)}.items():
        alone[name] = np.asarray(render(Scene(first, "white", "medium", "centre", relation, second)), np.int16)
    halves: dict[str, Any] = {
        "left of": np.s_[:, :64],
        "right of": np.s_[:, 64:],
        "above": np.s_[:64],
        "below": np.s_[64:],
    }
    half = halves[relation]
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    # "a left of b" and "b right of a" are one picture, and the named half holds the first subject.
    assert np.array_equal(canvas, np.asarray(render(Scene(other, "white", "medium", "centre", mirror, one)), np.int16))
    assert not np.array_equal(canvas[half], alone["swapped"][half])


def test_places_and_sizes_move_the_ink() -> None:
    subject = subjects()[0]

    def box(size: str, place: str) -> tuple[float, float, int]:
        ink = np.abs(np.asarray(render(Scene(subject, "white", size, place)), np.int16) - COLOURS["white"]).sum(-1) > 30
        rows, columns = np.nonzero(ink)
        return rows.mean(), columns.mean(), int(columns.max() - columns.min())

    assert box("small", "left")[1] < 45 < 83 < box("small", "right")[1]
    assert box("small", "top")[0] < 45 < 83 < box("small", "bottom")[0]
    assert box("small", "centre")[2] < box("medium", "centre")[2] < box("large", "centre")[2]


@pytest.mark.parametrize("look", list(LOOKS))
def test_the_folder_is_an_ordinary_captioned_one(tmp_path: Path, look: str) -> None:
    out = compose.write_folder(tmp_path / "data", 12, 9, look=look)
    samples, _ = read_source(DataSource(path=str(out)))
    assert len(samples) == 12
    assert all(len(sample.captions) == 3 for sample in samples)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    lines = (out / rows[0]["file_name"]).with_suffix(".txt").read_text().splitlines()
    assert lines == list(rows[0]["captions"].values())


def test_pencil_leaves_no_colour_and_says_so() -> None:
    colours, paper, lead = set(), np.array(COLOURS["white"]), np.array((48, 44, 52))
    for index in range(40):
        what = scene(2, index, pairs=0.0)
        drawn = np.asarray(LOOKS["pencil"].picture(render(what)), np.float32)
        # Every pixel lies on the line between lead and paper.
        share = (drawn - lead) / (paper - lead)
        assert np.ptp(share, axis=-1).max() < 0.02
        colours.add(what.colour)
        texts = LOOKS["pencil"].captions(what)
        assert texts["short"].endswith(" on white")
        assert texts["tags"].endswith("white background")
        assert "pencil drawing" in texts["long"]
        assert "white paper" in texts["long"]
        others = [colour for colour in COLOURS if colour != "white"]
        assert not [c for c in others for text in texts.values() if f"on {c}" in text or f"{c} background" in text]
    assert len(colours) == len(COLOURS)
