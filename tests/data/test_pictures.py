from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from libreflux.data.pictures import inspect, load_rgb
from libreflux.errors import DataError
from odd_pictures import PILLOW, SIZE, SIZES, UNUSABLE, UNUSUAL, deep, noise, png_of, premultiplied, saved, tiff
from rights import bound_by_modes


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


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_has_a_reason_on_one_line(tmp_path: Path, name: str) -> None:
    suffix, reason, make = UNUSABLE[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(make())
    found = inspect(path)
    assert found.fault.startswith("unreadable picture (")
    assert "\n" not in found.fault
    assert str(tmp_path) not in found.fault
    assert (found.width, found.height) == (0, 0)
    assert reason.lower() in found.fault.lower()  # Pillow's capitals change
    with pytest.raises(DataError, match="hint: repair it or remove it"):
        load_rgb(path)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_read(tmp_path: Path, name: str) -> None:
    suffix, make = UNUSUAL[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(make())
    found = inspect(path)
    size = SIZES.get(name, SIZE)
    assert (found.fault, found.width, found.height) == ("", *size)
    image = load_rgb(path)
    assert (image.mode, image.size) == ("RGB", size)
    if name == "interlaced":
        assert (np.asarray(image) == np.asarray(noise("L").convert("RGB"))).all()
    if name.startswith("16_bit"):
        assert set(np.unique(np.asarray(image))) <= {155, 156}  # 40,000 / 257
    if name.startswith("moving"):
        first = np.asarray(noise("P" if suffix == "gif" else "RGB").convert("RGB"))
        assert (np.asarray(image) == first).all()


def test_what_is_no_readable_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    (tmp_path / "secret.png").write_bytes(saved(noise(), "PNG"))
    (tmp_path / "secret.png").chmod(0)
    with bound_by_modes():
        faults = {path.stem: inspect(path).fault for path in tmp_path.iterdir()}
    assert faults == {
        "loop": "cannot be read (Too many levels of symbolic links)",
        "gone": "cannot be read (No such file or directory)",
        "pipe": "not a regular file",
        "secret": "cannot be read (Permission denied)",
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    undone = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(undone[orientation]) if orientation > 1 else image
    for suffix in ("png", "webp"):
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / f"{orientation}.{suffix}"
        stored.save(path, exif=exif, **options)
        assert (np.asarray(load_rgb(path)) == np.asarray(image)).all()
        found = inspect(path)
        assert (found.fault, found.width, found.height) == ("", *image.size)


RED = (255, 0, 0)
WHITE = (255, 255, 255)


def grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


@pytest.mark.parametrize(
    ("name", "make", "seen"),
    [
        ("16 bits", lambda: tiff(16, b"\x40\x9c" * 16), {grey(156)}),
        ("16 bits, 0 is white", lambda: tiff(16, b"\x40\x9c" * 16, zero_is_white=True), {grey(255 - 156)}),
        ("8 bits, 0 is white", lambda: tiff(8, b"\x28" * 16, zero_is_white=True), {grey(215)}),
        ("12 bits", lambda: tiff(12, b"\xff" * 24), {WHITE}),
        ("4 bits", lambda: tiff(4, b"\x99" * 8), {grey(153)}),
        ("1 bit", lambda: tiff(1, b"\x0f" * 2), {grey(0), WHITE}),
        ("lab", lambda: saved(Image.new("LAB", SIZE, (136, 208, 195)), "TIFF"), {(250, 3, 11)}),
        ("cmyk tiff", lambda: saved(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "TIFF"), {RED}),
    ],
)
def test_black_and_white_are_where_the_format_says(
    tmp_path: Path, name: str, make: Callable[[], bytes], seen: set[tuple[int, int, int]]
) -> None:
    (tmp_path / "a.tif").write_bytes(make())
    assert set(map(tuple, np.asarray(load_rgb(tmp_path / "a.tif")).reshape(-1, 3).tolist())) == seen, name


NEEDS_PILLOW_13 = pytest.mark.skipif(PILLOW < 13, reason="Pillow 13 reads it, older ones refuse it: odd_pictures.py")


@pytest.mark.parametrize(
    ("name", "make", "seen"),
    [
        ("1 bit, black", lambda: png_of(1, 0, b"\x0f", deep(0)), {RED, WHITE}),
        ("1 bit, white", lambda: png_of(1, 0, b"\x0f", deep(1)), {RED, grey(0)}),
        ("2 bits", lambda: png_of(2, 0, b"\x05\x05", deep(1)), {RED, grey(0)}),
        ("4 bits", lambda: png_of(4, 0, b"\x03\x03\x03\x03", deep(3)), {RED, grey(0)}),
        ("8 bits", lambda: png_of(8, 0, bytes([9, 50] * 4), deep(9)), {RED, grey(50)}),
        ("16 bits", lambda: png_of(16, 0, deep(40000, 100) * 4, deep(40000)), {RED, grey(0)}),
        ("colour", lambda: png_of(8, 2, bytes([1, 2, 3, 9, 9, 9] * 4), deep(1, 2, 3)), {RED, grey(9)}),
        (
            "deep colour",
            lambda: png_of(16, 2, deep(*[40000] * 3, *[100] * 3) * 4, deep(*[40000] * 3)),
            {RED, grey(0)},
        ),
        ("palette", lambda: png_of(8, 3, bytes([0, 1] * 4), b"\0", bytes([9, 9, 9, 7, 7, 7])), {RED, grey(7)}),
        ("deep grey and alpha", lambda: png_of(16, 4, deep(40000, 65535, 100, 0) * 4), {RED, grey(156)}),
        pytest.param("premultiplied", premultiplied, {RED, grey(100)}, marks=NEEDS_PILLOW_13),
    ],
)
def test_what_a_format_calls_transparent_shows_the_background(
    tmp_path: Path, name: str, make: Callable[[], bytes], seen: set[tuple[int, int, int]]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(make())
    assert inspect(path).fault == ""
    assert set(map(tuple, np.asarray(load_rgb(path, "red")).reshape(-1, 3).tolist())) == seen, name
