"""The family's held-out pictures: new to every model, true to their captions, the same for everybody."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from libreflux.emoji import compose, held_out
from libreflux.emoji.build.base import scenes
from libreflux.emoji.build.judge import split
from libreflux.probing.subjects import parse_prompt


def test_scenes_are_of_the_judges_held_out_tenth_and_spread_over_subjects() -> None:
    found, rows = held_out.held_out_scenes(192), set(split()[1])
    singles = scenes()[0]
    assert len(set(found)) == 192
    assert all(singles.index(what) in rows for what in found[::16])
    assert found[:64] == held_out.held_out_scenes(64)
    times = [sum(what.subject == subject for what in found) for subject in compose.subjects()]
    assert max(times) <= 2
    assert times.count(0) < 5


def test_pictures_are_moved_whole() -> None:
    for index, what in enumerate(held_out.held_out_scenes(24)):
        still, moved = (
            np.asarray(picture, np.int64) for picture in (compose.render(what), held_out.moved(what, index))
        )
        plain = np.array(compose.COLOURS[what.colour])
        spots = [np.argwhere((abs(each - plain) > 0).any(axis=2)) for each in (still, moved)]
        shift = spots[1].min(axis=0) - spots[0].min(axis=0)
        assert (abs(shift) >= 1).all()
        assert (abs(shift) <= held_out.SHIFT).all()
        np.testing.assert_array_equal(spots[1], spots[0] + shift)  # nothing is cut off


def test_a_written_folder_is_kept_and_prompts_begin_alike(tmp_path: Path) -> None:
    folder = held_out.write_held_out(tmp_path / "data", 3)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    held_out.write_held_out(folder, 3)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(before) == 4
    prompts = held_out.prompts(200)
    assert prompts[:10] == held_out.prompts(10)
    read = [
        parse_prompt(text, {"subject": held_out.subject_names(), "colour": list(compose.COLOURS)}) for text in prompts
    ]
    assert len({one.subject for one in read[: len(compose.subjects())]}) == len(compose.subjects())
    assert all(one.colour for one in read)
