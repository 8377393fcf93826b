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
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_PIXELS = 2**27  # 0.4 GB of RGB; a file of a few kilobytes can promise a hundred times that
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


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
        _, (width, height) = _decoded(path, reduce=8)
    except DataError as error:
        return Inspected(digest, 0, 0, error.what)
    return Inspected(digest, width, height, "")


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """An RGB picture: turned as EXIF says, alpha laid over ``background``, an embedded profile converted to sRGB.

    Of a moving picture the first frame; of 16 bits the upper 8.

    Raises:
        DataError: damaged or truncated file.
    """
    image, _ = _decoded(path)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        scaled = (np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255)
        image = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
    if profile:
        image = _to_srgb(image, profile)
    if not transparent:
        return image.convert("RGB")
    canvas = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(canvas, image).convert("RGB")


def _decoded(path: Path, reduce: int = 1) -> tuple[Image.Image, tuple[int, int]]:
    """(upright pixels in the file's mode, upright (width, height)); JPEG pixels are reduced if so wished.

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
                if file.mode == "F":
                    raise ValueError("floating-point pixels of unknown range")
                if file.getexif().get(_ORIENTATION) in _SIDEWAYS:
                    size = size[::-1]
                if reduce > 1:
                    file.draft(None, (max(1, file.size[0] // reduce), max(1, file.size[1] // reduce)))
                file.load()
                return ImageOps.exif_transpose(file), size
    except UnidentifiedImageError:
        reason = "neither PNG, JPEG, WebP, GIF, BMP nor TIFF"
    except Exception as error:  # Pillow's plug-ins meet bytes that they do not expect: the file is at fault
        reason = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
    raise DataError(f"unreadable picture ({reason})", where=path, mend="repair it or remove it")


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
