"""A picture file → what is wrong with it, or upright sRGB pixels without alpha."""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from libreflux.errors import DataError
from libreflux.files import sha256_file

FORMATS = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_PIXELS = 2**27  # 0.4 GB of RGB; a file of a few kilobytes can promise a hundred times that
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_COLOUR = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *_PREMULTIPLIED})
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PNG_DEPTH = 24  # where its header has the bits per channel
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


@dataclass(frozen=True)
class Inspected:
    """What a picture file is.

    Attributes:
        digest: SHA-256 of its bytes, 64 hexadecimal digits; "" if they cannot be read.
        width: in pixels, upright; 0 when unreadable.
        height: likewise.
        fault: why it cannot be used; "" when it can.
    """

    digest: str
    width: int
    height: int
    fault: str


def inspect(path: Path) -> Inspected:
    """Reads a whole picture file: its digest, its upright size, and what is wrong with it, if anything.

    JPEG is decoded at an eighth of the size, which reads every byte too.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return Inspected("", 0, 0, "not a regular file")  # opening a pipe would wait for its writer
        digest = sha256_file(path)
    except OSError as error:
        return Inspected("", 0, 0, f"cannot be read ({error.strerror})")
    try:
        width, height = _decoded(path, reduce=8).size
    except DataError as error:
        return Inspected(digest, 0, 0, error.what)
    return Inspected(digest, width, height, "")


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """An RGB picture: turned as EXIF says, alpha laid over ``background``, an embedded profile converted to sRGB.

    Of a moving picture the first frame; of 16 bits the upper 8.

    Raises:
        DataError: damaged or truncated file.
    """
    found = _decoded(path)
    image, profile = found.image, found.image.info.get("icc_profile")
    if image.mode in _DEEP_GREY:
        image = _shallow(found)
    image = image.convert(_PREMULTIPLIED.get(image.mode, image.mode))
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
    if profile:
        image = _to_srgb(image, profile)
    if not transparent:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image).convert("RGB")


@dataclass(frozen=True)
class _Decoded:
    """Upright pixels in the file's mode, reduced if so wished; size: (width, height), upright, of the whole picture.

    Of deep grey (9 to 16 bits) `top` is the value of white, or under `inverted` of black.
    """

    image: Image.Image
    size: tuple[int, int]
    top: int
    inverted: bool


def _decoded(path: Path, reduce: int = 1) -> _Decoded:
    """A picture's pixels.

    Raises:
        DataError: of no format that is read, damaged, cut short, or of more than MAX_PIXELS: whatever Pillow says.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs (the limit is ours), of EXIF and palettes a little off
            with Image.open(path, formats=sorted({*FORMATS.values()})) as file:
                size = file.size
                if size[0] * size[1] > MAX_PIXELS:
                    raise ValueError(f"{size[0]} x {size[1]} pixels, more than {MAX_PIXELS / 1e6:.0f} million")
                _refuse_unknown_range(file)
                if file.getexif().get(_ORIENTATION) in _SIDEWAYS:
                    size = size[::-1]
                if reduce > 1:
                    file.draft(None, (max(1, file.size[0] // reduce), max(1, file.size[1] // reduce)))
                file.load()
                _scale_transparency(file, path)
                tags = getattr(file, "tag_v2", {})
                top = 2 ** int(tags[_TIFF_BITS][0]) - 1 if _TIFF_BITS in tags else 65535
                return _Decoded(ImageOps.exif_transpose(file), size, top, tags.get(_TIFF_PHOTOMETRIC) == 0)
    except UnidentifiedImageError:
        reason = "neither PNG, JPEG, WebP, GIF, BMP nor TIFF"
    except Exception as error:  # Pillow's plug-ins meet bytes that they do not expect: the file is at fault
        reason = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
    raise DataError(f"unreadable picture ({reason})", where=path, hint="repair it or remove it")


def _refuse_unknown_range(file: Image.Image) -> None:
    """Raises ValueError for numbers that no format says the black and white of, and for what has no way to RGB."""
    if file.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    if file.mode == "I" and file.format != "PNG":  # Pillow 10 calls 16-bit PNG so
        raise ValueError("32-bit or signed pixels of unknown range")
    if 2 in getattr(file, "tag_v2", {}).get(_TIFF_SAMPLE_FORMAT, ()):  # Pillow takes signed 8 bits for unsigned ones
        raise ValueError("signed pixels of unknown range")
    if file.mode not in _COLOUR and file.mode not in _DEEP_GREY:
        raise ValueError(f"pixels of the unknown kind {file.mode}")


def _scale_transparency(file: Image.Image, path: Path) -> None:
    """Brings a PNG's transparent colour to the depth that Pillow gives its pixels, which it does not do itself."""
    mark = file.info.get("transparency")
    if file.format != "PNG" or mark is None:
        return
    with open(path, "rb") as raw:
        depth = raw.read(_PNG_DEPTH + 1)[_PNG_DEPTH]
    if file.mode == "L" and depth in (2, 4):
        file.info["transparency"] = mark * 255 // (2**depth - 1)
    elif file.mode == "1":
        file.info["transparency"] = 255 if mark else 0  # Pillow itself only from 12.1 on
    elif file.mode == "RGB" and depth == 16:
        file.info["transparency"] = tuple(value >> 8 for value in mark)


def _shallow(found: _Decoded) -> Image.Image:
    """Deep grey in 8 bits: Pillow's own conversion clips instead of scaling."""
    deep = np.asarray(found.image, dtype=np.float64)
    scaled = (deep * (255.0 / found.top)).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(255 - scaled if found.inverted else scaled)
    mark = found.image.info.get("transparency")
    if mark is not None:
        image = Image.merge("LA", (image, Image.fromarray(np.where(deep == mark, 0, 255).astype(np.uint8))))
    return image


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    flat = image.convert("RGB") if alpha is not None or image.mode == "P" else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a profile that does not fit its picture is what every viewer ignores too
    if converted is None:
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
