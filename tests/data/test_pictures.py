from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from libreflux.data.pictures import inspect, load_rgb
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


SIZE = (24, 16)


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def flipped(data: bytes, *, start: int) -> bytes:
    """With every 64th byte from ``start`` turned over."""
    broken = bytearray(data)
    for place in range(start, len(broken), 64):
        broken[place] ^= 0xFF
    return bytes(broken)


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG whose header promises this size, with whatever pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def gif_of_a_huge_screen() -> bytes:
    data = bytearray(saved(noise("P"), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


UNUSABLE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("png", lambda: b""),
    "text": ("jpg", lambda: b"<html>404 Not Found</html>"),
    "zeros": ("png", lambda: bytes(5000)),
    "svg": ("png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "cut_png": ("png", lambda: saved(noise(), "PNG")[:-400]),
    "cut_jpeg": ("jpg", lambda: saved(noise(size=(200, 200)), "JPEG")[:9000]),
    "cut_webp": ("webp", lambda: saved(noise(size=(200, 200)), "WEBP", lossless=True)[:3000]),
    "cut_gif": ("gif", lambda: saved(noise("P"), "GIF")[:200]),
    "cut_bmp": ("bmp", lambda: saved(noise(), "BMP")[:-300]),
    "cut_tiff": ("tif", lambda: saved(noise(), "TIFF", compression="tiff_lzw")[:400]),
    "header_alone_png": ("png", lambda: saved(noise(), "PNG")[:33]),
    "header_alone_jpeg": ("jpg", lambda: saved(noise(), "JPEG")[:20]),
    "flipped_png": ("png", lambda: flipped(saved(noise(size=(200, 200)), "PNG"), start=60)),
    "flipped_jpeg_header": ("jpg", lambda: flipped(saved(noise(), "JPEG"), start=2)),
    "flipped_webp": ("webp", lambda: flipped(saved(noise(), "WEBP"), start=4)),
    "bad_crc_png": ("png", lambda: png(8, 8, data=bytes(8 * 25)).replace(b"IHDR\0\0\0\x08", b"IHDR\0\0\0\x09")),
    "no_pixels_png": ("png", lambda: png(8, 8)),
    "zero_wide_png": ("png", lambda: png(0, 8)),
    "bomb_png": ("png", lambda: png(50_000, 50_000, data=bytes(1000))),
    "bomb_just_over": ("png", lambda: png(2**14, 2**13 + 1, colour=0, data=bytes(1000))),
    "bomb_gif": ("gif", gif_of_a_huge_screen),
    "bomb_negative": ("png", lambda: png(2**31, 2**31)),
    "bad_depth_png": ("png", lambda: png(8, 8, depth=3, data=bytes(200))),
    "float_tiff": ("tiff", lambda: saved(Image.new("F", SIZE, 0.5), "TIFF")),
    "pdf": ("jpg", lambda: b"%PDF-1.4\n" + bytes(3000)),
    "jpeg_2000": ("jp2.jpg", lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(3000)),
    "zip": ("webp", lambda: b"PK\x03\x04" + bytes(3000)),
}
UNUSUAL: dict[str, tuple[str, Callable[[], bytes]]] = {
    "jpeg_named_png": ("png", lambda: saved(noise(), "JPEG")),
    "png_named_jpg": ("jpg", lambda: saved(noise(), "PNG")),
    "cmyk": ("jpg", lambda: saved(noise("CMYK"), "JPEG")),
    "ycbcr_tiff": ("tif", lambda: saved(noise("YCbCr"), "TIFF")),
    "lab_tiff": ("tif", lambda: saved(Image.new("LAB", SIZE, (128, 128, 128)), "TIFF")),
    "grey": ("png", lambda: saved(noise("L"), "PNG")),
    "grey_alpha": ("png", lambda: saved(noise("LA"), "PNG")),
    "one_bit": ("png", lambda: saved(noise("1"), "PNG")),
    "palette": ("png", lambda: saved(noise("P"), "PNG")),
    "palette_alpha": ("png", lambda: saved(noise("P"), "PNG", transparency=0)),
    "rgba_webp": ("webp", lambda: saved(noise("RGBA"), "WEBP")),
    "16_bit": ("png", lambda: saved(Image.fromarray(np.full(SIZE[::-1], 40_000, np.uint16)), "PNG")),
    "16_bit_tiff": ("tif", lambda: saved(Image.fromarray(np.full(SIZE[::-1], 40_000, np.uint16)), "TIFF")),
    "16_bit_big_endian": ("tif", lambda: saved(Image.frombytes("I;16B", SIZE, b"\x9c\x40" * 384), "TIFF")),
    "16_bit_rgb": ("png", lambda: png(24, 16, depth=16, data=(b"\0" + b"\x9c\x40" * 72) * 16)),
    "moving_gif": ("gif", lambda: saved(noise("P"), "GIF", save_all=True, append_images=[noise("P", seed=1)])),
    "moving_webp": (
        "webp",
        lambda: saved(noise(), "WEBP", lossless=True, save_all=True, append_images=[noise(seed=1)]),
    ),
    "moving_png": ("png", lambda: saved(noise(), "PNG", save_all=True, append_images=[noise(seed=1)])),
    "progressive": ("jpg", lambda: saved(noise(), "JPEG", progressive=True)),
    "bad_profile": ("jpg", lambda: saved(noise(), "JPEG", icc_profile=b"no profile at all")),
    "bad_exif": ("jpg", lambda: saved(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    "trailing_bytes": ("jpg", lambda: saved(noise(), "JPEG") + b"appended by a camera" * 99),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_has_a_reason_on_one_line(tmp_path: Path, name: str) -> None:
    suffix, make = UNUSABLE[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(make())
    found = inspect(path)
    assert found.fault.startswith("unreadable picture (")
    assert "\n" not in found.fault and str(tmp_path) not in found.fault
    assert (found.width, found.height) == (0, 0)
    if name.startswith("bomb"):
        assert "million" in found.fault or "exceeds limit" in found.fault or "size" in found.fault
    with pytest.raises(DataError, match="mend: repair it or remove it"):
        load_rgb(path)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_read(tmp_path: Path, name: str) -> None:
    suffix, make = UNUSUAL[name]
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(make())
    found = inspect(path)
    assert (found.fault, found.width, found.height) == ("", *SIZE)
    image = load_rgb(path)
    assert (image.mode, image.size) == ("RGB", SIZE)
    if name.startswith("16_bit"):
        assert set(np.unique(np.asarray(image))) <= {155, 156}  # 40,000 / 257
    if name.startswith("moving"):
        first = np.asarray(noise("P" if suffix == "gif" else "RGB").convert("RGB"))
        assert (np.asarray(image) == first).all()


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
        options = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / f"{orientation}.{suffix}"
        stored.save(path, exif=exif, **options)
        assert (np.asarray(load_rgb(path)) == np.asarray(image)).all()
        found = inspect(path)
        assert (found.fault, found.width, found.height) == ("", *image.size)
