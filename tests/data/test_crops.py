from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from libreflux.data.crops import WIDEST, View, aspect_buckets, crop_window, cut, views

SQUARE = View("square", 16)


def test_the_first_crop_is_the_largest_centred_square() -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    crop = cut(image, SQUARE)
    assert crop.shape == (16, 16, 3)
    assert crop.dtype == np.uint8
    # Lanczos looks 3 pixels of the result beyond the square's edge, into the red.
    assert (crop[:, 3:-3] == (0, 0, 255)).all()
    assert (cut(image.rotate(90, expand=True), SQUARE)[3:-3] == (0, 0, 255)).all()
    assert crop[8, 0, 2] > 200
    assert (crop == crop[:, ::-1]).all()


@pytest.mark.parametrize("crop", ["square", "centre", "aspect"])
def test_a_crop_of_its_own_size_is_the_picture(crop: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert (cut(Image.fromarray(pixels), View(crop, 48, 16)) == pixels).all()


@pytest.mark.parametrize("view", [View("square", 32), View("aspect", 32, 16)])
def test_further_crops_stay_inside_differ_and_repeat(view: View) -> None:
    row, column = np.mgrid[0:100, 0:200].astype(np.uint8)
    image = Image.fromarray(np.stack([row, column, np.full_like(row, 255)], axis=-1))
    across, down = view.size(200, 100)
    seen = []
    for index in range(1, 9):
        crop = cut(image, view, index, "picture").astype(int)
        assert crop.shape == (down, across, 3)
        assert (crop == cut(image, view, index, "picture")).all()
        height, width = crop[-1, 0, 0] - crop[0, 0, 0], crop[0, -1, 1] - crop[0, 0, 1]
        assert abs(height / (down - 1) - width / (across - 1)) < 0.08  # not squeezed
        assert (crop[..., 2] == 255).all()
        seen.append((crop[0, 0, 0], crop[0, 0, 1], height))
    assert len(set(seen)) == len(seen)
    assert (cut(image, view, 1, "picture") != cut(image, view, 1, "other")).any()


sides = st.integers(1, 5000)


@given(sides, sides, st.sampled_from([(64, 16), (128, 16), (512, 64), (768, 64), (1024, 64)]), st.integers(0, 3))
def test_aspect_crops_keep_area_and_shape(width: int, height: int, scale: tuple[int, int], index: int) -> None:
    resolution, step = scale
    view = View("aspect", resolution, step)
    across, down = size = view.size(width, height)
    assert across % step == down % step == 0
    assert abs(across * down / resolution**2 - 1) <= 0.25
    assert view.size(height, width) == (down, across)
    left, top, right, bottom = crop_window(width, height, size, index, "picture")
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    assert (right - left) / (bottom - top) == pytest.approx(across / down)
    best = min(abs(math.log(w / h * height / width)) for w, h in aspect_buckets(resolution, step))
    assert abs(math.log(across / down * height / width)) == pytest.approx(best)
    if index == 0 and WIDEST**-1 < width / height < WIDEST and resolution >= 512:
        kept = (right - left) * (bottom - top) / (width * height)
        assert kept > 0.85  # at most a seventh of a picture of ordinary shape is lost


def test_centre_is_the_first_square_whatever_the_number_of_crops() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    centre = View("centre", 16)
    assert centre.crops(5) == 1
    assert (cut(image, centre) == cut(image, SQUARE)).all()
    assert centre.name(0, "white") == SQUARE.name(0, "white")  # stored once


def test_crop_names_differ_where_pixels_do() -> None:
    shown = views(["square", "aspect"], [32, 64])
    assert len({view.name(index, colour) for view in shown for index in (0, 1) for colour in ("white", "black")}) == 16
    assert SQUARE.name(0, "White") == SQUARE.name(0, "white")


def test_buckets_are_finer_for_small_pictures() -> None:
    assert [view.step for view in views(["aspect"], [128, 512])] == [16, 64]
    assert {(128, 128), (160, 96), (96, 160)} <= set(aspect_buckets(128, 16))
    assert {(1024, 1024), (1344, 768), (768, 1344)} <= set(aspect_buckets(1024, 64))
