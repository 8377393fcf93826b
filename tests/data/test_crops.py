from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from libreflux.data.crops import check_picture, crop_name, load_rgb, square_crop
from libreflux.errors import DataError


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    pixels = np.asarray(image)
    return [tuple(map(int, pixels[row, column])) for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1))]


def quarters() -> Image.Image:
    image = Image.new("RGB", (16, 16), "red")
    image.paste("lime", (8, 0, 16, 8))
    image.paste("blue", (0, 8, 8, 16))
    image.paste("white", (8, 8, 16, 16))
    return image


def test_exif_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    quarters().save(tmp_path / "turned.png", exif=exif)
    upright = quarters().transpose(Image.Transpose.ROTATE_270)
    assert corners(load_rgb(tmp_path / "turned.png")) == corners(upright)


@pytest.mark.parametrize("background", ["white", "#102030"])
def test_alpha_is_laid_over_the_background(tmp_path: Path, background: str) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.save(tmp_path / "a.png")
    ground = np.array(Image.new("RGB", (1, 1), background).getpixel((0, 0)))
    pixels = np.asarray(load_rgb(tmp_path / "a.png", background)).astype(int)
    assert (pixels[0, 0] == ground).all()
    expected = (np.array([200, 0, 0]) * 128 + ground * 127) / 255
    assert np.abs(pixels[3, 3] - expected).max() <= 1


def test_palette_transparency_and_grey_alpha_count_as_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    assert set(corners(load_rgb(tmp_path / "p.png"))) == {(255, 255, 255)}
    assert set(corners(load_rgb(tmp_path / "la.png"))) == {(255, 255, 255)}


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 50], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.asarray(load_rgb(tmp_path / "grey.png"))[..., 0].tolist() == [[0, 50], [200, 255]]


def test_cmyk_and_grey_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    red = corners(load_rgb(tmp_path / "c.jpg"))[0]
    assert red[0] > 230
    assert max(red[1:]) < 25
    assert corners(load_rgb(tmp_path / "l.png"))[0] == (77, 77, 77)


def test_an_embedded_profile_is_converted(tmp_path: Path) -> None:
    # LAB is the one other space that Pillow can make a profile of; an RGB file tagged sRGB must stay as it is.
    profile = io.BytesIO(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()).getvalue()
    quarters().save(tmp_path / "s.png", icc_profile=profile)
    assert corners(load_rgb(tmp_path / "s.png")) == corners(quarters())
    quarters().save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert corners(load_rgb(tmp_path / "broken.png")) == corners(quarters())


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_cut_file_is_unreadable(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    assert check_picture(whole) == (64, 64)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for read in (check_picture, load_rgb):
        with pytest.raises(DataError, match=rf"cut\.{suffix}: unreadable picture .*; mend: repair it or remove it"):
            read(cut)


def test_the_first_crop_is_the_largest_centred_square() -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    crop = square_crop(image, 16)
    assert crop.shape == (16, 16, 3)
    assert crop.dtype == np.uint8
    # Lanczos looks 3 pixels of the result beyond the square's edge, into the red.
    assert (crop[:, 3:-3] == (0, 0, 255)).all()
    assert (square_crop(image.rotate(90, expand=True), 16)[3:-3] == (0, 0, 255)).all()
    assert crop[8, 0, 2] > 200
    assert (crop == crop[:, ::-1]).all()


def test_a_crop_of_its_own_size_is_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert (square_crop(Image.fromarray(pixels), 48) == pixels).all()


def test_further_crops_stay_inside_differ_and_repeat() -> None:
    row, column = np.mgrid[0:100, 0:200].astype(np.uint8)
    image = Image.fromarray(np.stack([row, column, np.full_like(row, 255)], axis=-1))
    seen = []
    for index in range(1, 9):
        crop = square_crop(image, 32, index, "picture").astype(int)
        assert (crop == square_crop(image, 32, index, "picture")).all()
        height, width = crop[-1, 0, 0] - crop[0, 0, 0], crop[0, -1, 1] - crop[0, 0, 1]
        assert abs(height - width) <= 2  # not squeezed
        assert 0.8 * 100 * 31 / 32 - 3 <= height <= 100
        assert (crop[..., 2] == 255).all()
        seen.append((crop[0, 0, 0], crop[0, 0, 1], height))
    assert len(set(seen)) == len(seen)
    assert (square_crop(image, 32, 1, "picture") != square_crop(image, 32, 1, "other")).any()


def test_crop_names_differ_where_pixels_do() -> None:
    names = {crop_name(r, i, b) for r in (32, 64) for i in (0, 1) for b in ("white", "black")}
    assert len(names) == 8
    assert crop_name(32, 0, "White") == crop_name(32, 0, "white")
