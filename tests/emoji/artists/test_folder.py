"""Captioned folders of training scenes, and what stays true of them under another look."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libreflux.emoji.artists import captions, folder, held_out, scenes
from libreflux.emoji.artists.scenes import Background
from libreflux.emoji.artists.subjects import LOOKS
from libreflux.emoji.compose import pencil


def test_a_folder_holds_training_scenes_with_their_captions(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    out = folder.write_folder(tmp_path / "pictures", 3, 7, progress=lambda *told: done.append(told))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [row["captions"] for row in rows] == [captions.captions(held_out.training_scene(7, i)) for i in range(3)]
    assert done == [(1, 3), (2, 3), (3, 3)]
    for row in rows:
        assert (out / row["file_name"]).with_suffix(".txt").read_text("utf-8").splitlines() == [
            *row["captions"].values()
        ]
        assert Image.open(out / row["file_name"]).size == (128, 128)


def test_pencil_is_grey_on_white_and_no_caption_tells_otherwise(tmp_path: Path) -> None:
    out = folder.write_folder(tmp_path / "pictures", 4, 1, look="pencil")
    for index, row in enumerate(map(json.loads, (out / "metadata.jsonl").read_text("utf-8").splitlines())):
        pixels = np.asarray(Image.open(out / row["file_name"])).astype(int)
        assert (pixels.max(-1) - pixels.min(-1)).max() < 12
        assert pixels.mean() > 180
        what = held_out.training_scene(1, index)
        words = {word for text in row["captions"].values() for word in re.findall(r"\w+", text)}
        assert not words & {*LOOKS, "gradient", "half", "red", "blue"}
        assert what.figures[0].subject.name in row["captions"]["bare"]
        assert row["captions"]["full"].endswith("on white")


def test_nothing_of_the_background_is_left_in_pencil(tmp_path: Path) -> None:
    out = folder.write_folder(tmp_path / "pictures", 12, 1, look="pencil")
    kinds = set()
    for index, file in enumerate(sorted(out.glob("*.png"))):
        what = held_out.training_scene(1, index)
        kinds.add(what.background.kind)
        white = replace(what, background=Background("white"))
        assert (np.asarray(Image.open(file)) == np.asarray(pencil(scenes.render(white)))).all()
    assert "halves" in kinds


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_the_share_of_pairs_is_kept(tmp_path: Path, pairs: float) -> None:
    out = folder.write_folder(tmp_path / "pictures", 3, 2, pairs=pairs)
    rows = [json.loads(line)["captions"]["bare"] for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [any(word in text for word in (" of ", "above", "below")) for text in rows] == [bool(pairs)] * 3
