"""Contact sheets: every picture whole, in its place, under its labels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from libreflux.sample.grid import sheet

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


def centres(image: Image.Image) -> list[tuple[float, float]]:
    """Where each colour's 20x20 pixels are; fails unless every one is whole."""
    pixels = np.asarray(image)
    found = []
    for colour in COLOURS:
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        assert len(rows) == 400
        found.append((rows.mean(), columns.mean()))
    return found


@pytest.mark.parametrize("rows", [[], ["one", "a label so long that it needs more lines than its picture is high"]])
@pytest.mark.parametrize("columns", [[], ["guidance 1", "guidance 3", "guidance 6"]])
def test_pictures_stay_whole_and_in_order(rows: list[str], columns: list[str]) -> None:
    images = [Image.new("RGB", (20, 20), colour) for colour in COLOURS]
    made = sheet([images[:3], images[3:]], rows, columns)
    places = centres(made)
    for row in (0, 3):
        assert places[row][0] == places[row + 1][0] == places[row + 2][0]
        assert places[row][1] < places[row + 1][1] < places[row + 2][1]
    assert places[0][0] < places[3][0]
    assert places[0][1] == places[3][1]
    inked = (np.asarray(made) < 100).all(axis=-1).any()
    assert inked == bool(rows or columns)


def test_labels_stand_beside_their_rows() -> None:
    images = [[Image.new("RGB", (60, 60), colour)] for colour in COLOURS[:3]]
    inked = (np.asarray(sheet(images, ["x", "", "x"])).max(axis=-1) < 100).max(axis=1)
    bands = [inked[start : start + 60].any() for start in (8, 76, 144)]
    assert bands == [True, False, True]


def test_gaps_and_sizes() -> None:
    small, large = Image.new("L", (8, 8)), Image.new("RGB", (20, 10), COLOURS[0])
    made = sheet([[small, None], [None, large, small]])
    assert made.size == (8 + 3 * 28, 8 + 2 * 18)
    with pytest.raises(ValueError, match="no pictures"):
        sheet([[None]])
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        sheet([[small], [small]], ["a"])
