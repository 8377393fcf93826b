"""Whether a cache fits on its disk, before hours are spent on it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.data.int8_text import token_bytes
from libreflux.errors import DataError
from libreflux.model.locate import part_folder

CHARACTERS_PER_TOKEN = 3.0  # English under T5's vocabulary has above four: the estimate is on the safe side
HEADER = 128  # bytes of a tensor's entry in its shard
SPARE = 2**26  # what may be left on the disk at the end: 64 MB


def needed_bytes(
    model: Path,
    crops: Sequence[tuple[int, int]],
    texts: Sequence[str],
    max_tokens: int,
    text_cache: str = "bf16",
    latents: str = "mean",
) -> tuple[int, int]:
    """About how many bytes (latents, text) will be stored.

    Args:
        model: folder; the configurations of its VAE and text encoders say how wide things are.
        crops: (width, height) in pixels of each.
        texts: distinct captions.
        max_tokens: no caption has more.
        text_cache: "int8", or anything else for bf16.
        latents: "mean", or "sample" for mean and standard deviation.
    """
    vae, t5, clip = (_config(part_folder(model, part)) for part in ("vae", "text_encoder_2", "text_encoder"))
    stride = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    pixel = 4 * vae.get("latent_channels", 16) / stride**2
    stored = (2 if latents == "sample" else 1) * sum(width * height * pixel + HEADER for width, height in crops)
    tokens = sum(min(max_tokens, len(text) / CHARACTERS_PER_TOKEN + 1) for text in texts)
    width, pooled = t5.get("d_model", 4096), clip.get("hidden_size", 768)
    per_token, parts = (token_bytes(width), 3) if text_cache == "int8" else (2 * width, 2)
    return int(stored), int(tokens * per_token + len(texts) * (2 * pooled + parts * HEADER))


def check_disk(
    model: Path,
    out: Path,
    crops: Sequence[tuple[int, int]],
    texts: Sequence[str],
    max_tokens: int,
    text_cache: str = "bf16",
    latents: str = "mean",
) -> None:
    """Refuses to begin what the disk cannot hold; see :func:`needed_bytes`.

    Raises:
        DataError: says what is needed and what is free.
    """
    pictures, text = needed_bytes(model, crops, texts, max_tokens, text_cache, latents)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if pictures + text + SPARE > free:
        less_text = "text_cache: none" if text_cache == "int8" else "text_cache: int8 or none"
        fewer = "fewer crops_per_picture or resolutions" + (", or latents: mean" if latents == "sample" else "")
        smaller = less_text if text > pictures else fewer
        mend = f"free some, put `cache` on another disk, or use {smaller}"
        needed = f"needs {_told(pictures + text)} (latents {_told(pictures)}, text {_told(text)})"
        told = f"{needed} and {_told(SPARE)} to spare; {_told(free)} free"
        raise DataError(told, where=out, mend=mend)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    values: dict[str, Any] = plainjson.parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def _told(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
