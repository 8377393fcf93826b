"""A picture file → upright sRGB without alpha → square crops."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from libreflux import keyed
from libreflux.errors import DataError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ZOOM = 0.8  # the smallest window of a further crop, as a share of the shorter side


def crop_name(resolution: int, index: int, background: str) -> str:
    """The name that a crop is cached under: everything that decides its pixels apart from the picture."""
    return f"square-{resolution}-{index}-{background.lower()}"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An open picture file; whatever Pillow says inside the block becomes one line.

    Raises:
        DataError: no PNG, JPEG or WebP, damaged, cut short, or of more pixels than Pillow trusts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=sorted({*FORMATS.values()})) as image:
                yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not a PNG, JPEG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"unreadable picture ({reason})", where=path, mend="repair it or remove it") from None


def check_header(path: Path) -> tuple[int, int]:
    """The (width, height) that a picture's header promises.

    Raises:
        DataError: unreadable, or a moving picture.
    """
    with opened(path) as image:
        frames, size = getattr(image, "n_frames", 1), image.size
    if frames > 1:
        raise DataError(f"a moving picture ({frames} frames)", where=path, mend="save one frame of it")
    return size


def check_picture(path: Path) -> tuple[int, int]:
    """Decodes the whole file and gives its (width, height); JPEG at an eighth of the size, which reads every byte too.

    Raises:
        DataError: damaged or truncated file.
    """
    with opened(path) as image:
        size = image.size
        image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
        image.load()
    return size


def load_rgb(path: Path, background: str = "white") -> Image.Image:
    """An RGB picture: turned as EXIF says, alpha laid over ``background``, an embedded profile converted to sRGB.

    Raises:
        DataError: damaged or truncated file.
    """
    with opened(path) as file:
        file.load()
        profile = file.info.get("icc_profile")
        image: Image.Image = ImageOps.exif_transpose(file)
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


def square_crop(image: Image.Image, resolution: int, index: int = 0, picture: str = "") -> np.ndarray:
    """A square crop as uint8 [resolution, resolution, 3].

    Args:
        image: RGB.
        resolution: side in pixels; reached by one Lanczos resampling.
        index: 0 is the largest centred square; further ones take a window of 0.8 to 1 of the shorter side at a random
            place, keyed by (picture, index), never by a run's seed, so that a cache serves every run.
        picture: the sample's id.
    """
    width, height = image.size
    side = float(min(width, height))
    across, down = 0.5, 0.5
    if index > 0:
        zoom, across, down = keyed.rng(0, "crop", picture, index).random(3)
        side *= ZOOM + (1 - ZOOM) * zoom
    left, top = across * (width - side), down * (height - side)
    crop = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(crop, dtype=np.uint8)


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
