"""Files that are called pictures: those that cannot be used, with the reason, and those that are odd and can."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import PIL
from PIL import Image, ImageCms

SIZE = (24, 16)
PILLOW = int(PIL.__version__.split(".")[0])


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


def cut(kind: str, share: float, **options: object) -> bytes:
    """The first part of a picture's file."""
    data = saved(noise(size=(200, 200)), kind, **options)
    return data[: int(share * len(data))]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, interlaced: bool = False, data: bytes = b""
) -> bytes:
    """A PNG whose header promises this size, with whatever pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def png_with(extra: bytes) -> bytes:
    """An ordinary PNG with one more chunk after its header."""
    data = saved(noise(), "PNG")
    return data[:33] + extra + data[33:]


def png_of(depth: int, colour: int, row: bytes, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """An 8 x 2 PNG of two equal rows, with a tRNS chunk (PNG specification, 11.3.2.1) and a palette if so wished."""
    data = png(8, 2, depth=depth, colour=colour, data=(b"\0" + row) * 2)
    between = [chunk(kind, body) for kind, body in ((b"PLTE", palette), (b"tRNS", transparent)) if body]
    return data[:33] + b"".join(between) + data[33:]


def deep(*values: int) -> bytes:
    """16-bit numbers as PNG has them."""
    return struct.pack(f">{len(values)}H", *values)


def tiff(bits: int, data: bytes, *, zero_is_white: bool = False, sample_format: int = 1, alpha: int = 0) -> bytes:
    """An 8 x 2 grey TIFF 6.0, little-endian, of what Pillow reads and cannot write.

    Args:
        bits: of each number.
        data: the pixels, row by row.
        zero_is_white: PhotometricInterpretation 0.
        sample_format: 1 unsigned, 2 signed, 3 floating-point.
        alpha: 1: every pixel has an alpha that its grey is multiplied by.
    """
    words = {256: 8, 257: 2, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 8, 277: 1 + (alpha > 0), 278: 2}
    words |= {279: len(data), 339: sample_format} | ({338: alpha} if alpha else {})
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(words.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(words)) + entries + bytes(4)


def premultiplied() -> bytes:
    """Grey of 100 where alpha is whole, and nothing beside it."""
    return tiff(8, bytes([100, 255, 0, 0] * 8), alpha=1)


def interlaced() -> bytes:
    """Adam7 (PNG specification, 8.2), which Pillow reads and cannot write."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    pixels = np.asarray(noise("L"))
    rows = [row.tobytes() for x, y, right, down in passes for row in pixels[y::down, x::right]]
    return png(*SIZE, colour=0, interlaced=True, data=b"".join(b"\0" + row for row in rows if row))


def bad_crc() -> bytes:
    data = bytearray(saved(noise(), "PNG"))
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the pixels' checksum
    return bytes(data)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def gif_of_a_huge_screen() -> bytes:
    data = bytearray(saved(noise("P"), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


UNUSABLE: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "empty": ("png", "neither PNG", lambda: b""),
    "text": ("jpg", "neither PNG", lambda: b"<html>404 Not Found</html>"),
    "zeros": ("png", "neither PNG", lambda: bytes(5000)),
    "svg": ("png", "neither PNG", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "cut_gif": ("gif", "neither PNG", lambda: saved(noise("P"), "GIF")[:200]),
    "cut_bmp": ("bmp", "truncated", lambda: saved(noise(), "BMP")[:-300]),
    "cut_tiff": ("tif", "neither PNG", lambda: saved(noise(), "TIFF", compression="tiff_lzw")[:400]),
    "header_alone_png": ("png", "neither PNG", lambda: saved(noise(), "PNG")[:33]),
    "header_alone_jpeg": ("jpg", "neither PNG", lambda: saved(noise(), "JPEG")[:20]),
    "flipped_png": ("png", "unrecognized data", lambda: flipped(saved(noise(size=(200, 200)), "PNG"), start=60)),
    "flipped_jpeg_header": ("jpg", "neither PNG", lambda: flipped(saved(noise(), "JPEG"), start=2)),
    "flipped_webp": ("webp", "decoder", lambda: flipped(saved(noise(), "WEBP"), start=4)),
    "bad_crc_png": (
        "png",
        "neither PNG",
        lambda: png(8, 8, data=bytes(200)).replace(b"IHDR\0\0\0\x08", b"IHDR\0\0\0\x09"),
    ),
    "no_pixels_png": ("png", "truncated", lambda: png(8, 8)),
    "zero_wide_png": ("png", "neither PNG", lambda: png(0, 8)),
    "bomb_png": ("png", "exceeds limit", lambda: png(50_000, 50_000, data=bytes(1000))),
    "bomb_just_over": ("png", "million", lambda: png(2**14, 2**13 + 1, colour=0, data=bytes(1000))),
    "bomb_gif": ("gif", "exceeds limit", gif_of_a_huge_screen),
    "bomb_negative": ("png", "exceeds limit", lambda: png(2**31, 2**31)),
    "bad_depth_png": ("png", "neither PNG", lambda: png(8, 8, depth=3, data=bytes(200))),
    "float_tiff": ("tiff", "floating-point", lambda: saved(Image.new("F", SIZE, 0.5), "TIFF")),
    "whole_32_bit_tiff": ("tiff", "unknown range", lambda: tiff(32, struct.pack("<16I", *[2**31] * 16))),
    "signed_32_bit_tiff": ("tiff", "unknown range", lambda: tiff(32, bytes(64), sample_format=2)),
    "signed_16_bit_tiff": ("tiff", "unknown range", lambda: tiff(16, bytes(32), sample_format=2)),
    "signed_8_bit_tiff": ("tiff", "unknown range", lambda: tiff(8, bytes(16), sample_format=2)),
    "double_tiff": ("tiff", "neither PNG", lambda: tiff(64, bytes(128), sample_format=3)),
    "pdf": ("jpg", "neither PNG", lambda: b"%PDF-1.4\n" + bytes(3000)),
    "jpeg_2000": ("jp2.jpg", "neither PNG", lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(3000)),
    "zip": ("webp", "neither PNG", lambda: b"PK\x03\x04" + bytes(3000)),
    "html_error_page": ("jpg", "neither PNG", lambda: b"<!DOCTYPE html><title>403</title>" + b"<p>Forbidden</p>" * 99),
    "avif": ("png", "neither PNG", lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(3000)),
    "heic": ("jpg", "neither PNG", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(3000)),
    "jpeg_xl": ("jpg", "neither PNG", lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(3000)),
    "jpeg_xl_stream": ("jpg", "neither PNG", lambda: b"\xff\x0a" + bytes(3000)),
    "ico": ("png", "neither PNG", lambda: saved(noise(), "ICO")),
    "no_end_jpeg": ("jpg", "truncated", lambda: saved(noise(size=(200, 200)), "JPEG")[:-2]),
    "profile_bomb": ("png", "too large", lambda: png_with(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26), 9)))),
    "text_bomb": ("png", "too large", lambda: png_with(chunk(b"zTXt", b"p\0\0" + zlib.compress(bytes(2**26), 9)))),
}
for _share in (0.1, 0.5, 0.9, 0.99):
    for _name, (_suffix, _kind, _reason, _options) in {
        "png": ("png", "PNG", "truncated", {}),
        "jpeg": ("jpg", "JPEG", "truncated", {}),
        "webp": ("webp", "WEBP", "decoder", {}),
        "lossless_webp": ("webp", "WEBP", "decoder", {"lossless": True}),
    }.items():
        UNUSABLE[f"cut_{_name}_at_{_share}"] = (_suffix, _reason, partial(cut, _kind, _share, **_options))
SIZES = {"one_pixel": (1, 1), "thread": (4000, 1)}
"""(width, height) of those whose size is not SIZE."""
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
    "cut_profile": ("jpg", lambda: saved(noise(), "JPEG", icc_profile=srgb_profile()[:200])),
    "junk_exif": ("png", lambda: saved(noise(), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 200)),
    "orientation_nine": ("jpg", lambda: saved(noise(), "JPEG", exif=turned(9))),
    "bad_crc": ("png", bad_crc),
    "no_end": ("png", lambda: saved(noise(), "PNG")[:-12]),
    "interlaced": ("png", interlaced),
    "pages": ("tif", lambda: saved(noise(), "TIFF", save_all=True, append_images=[noise(seed=1, size=(8, 8))])),
    "one_pixel": ("png", lambda: saved(noise(size=SIZES["one_pixel"]), "PNG")),
    "thread": ("png", lambda: saved(noise(size=SIZES["thread"]), "PNG")),
}
if PILLOW < 13:  # it takes such YCbCr for pixels of four bytes, and does not know grey with a premultiplied alpha
    UNUSABLE["ycbcr_tiff"] = ("tif", "truncated", UNUSUAL.pop("ycbcr_tiff")[1])
    UNUSABLE["premultiplied"] = ("tif", "neither PNG", premultiplied)
