"""How much data a recipe names, before a picture is opened: counts, the cache's size, whether it fits on its disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.data.crops import views
from libreflux.data.int8_text import token_bytes
from libreflux.data.pictures import Inspected
from libreflux.data.sources import read_source
from libreflux.errors import DataError
from libreflux.model.locate import part_folder
from libreflux.recipe import DataSource, Recipe

CHARACTERS_PER_TOKEN = 3.0  # English under T5's vocabulary has above four: the estimate is on the safe side
HEADER = 128  # bytes of a tensor's entry in its shard
SPARE = 2**26  # what may be left on the disk at the end: 64 MB


@dataclass(frozen=True)
class Forecast:
    """What is expected of a recipe's data if no picture is broken, too small or there twice.

    Attributes:
        pictures: files.
        visits: samples that an epoch shows, each picture in each view as often as its rate says.
        cache_bytes: of the prepared latents and text.
        texts: distinct ones that are encoded, the empty prompt included.
    """

    pictures: int
    visits: float
    cache_bytes: int
    texts: int = 1


def forecast(recipe: Recipe, model: Path, max_tokens: int) -> Forecast:
    """Reads names and captions alone; every picture counts as a square, whose crops are as large as any other's.

    Args:
        recipe: its data, held-out pictures, views, sample prompts, latents and text cache are used.
        model: folder; see `needed_bytes`.
        max_tokens: no caption has more.

    Raises:
        DataError: see `sources.read_source`.
    """
    shown = views(recipe.crop, recipe.resolution)
    crops: list[tuple[int, int]] = []
    texts = {"", *recipe.samples.prompts}
    pictures, visits = 0, 0.0
    apart = [] if recipe.held_out.path is None else [DataSource(path=recipe.held_out.path)]
    for source in [*recipe.data, *apart]:
        samples, _ = read_source(source, _unopened)
        pictures += len(samples)
        rate = len(shown) * source.weight * source.repeats * (1 - recipe.held_out.share)
        visits += 0 if source in apart else rate * sum(sample.repeats for sample in samples)
        for view in shown:
            crops += [view.size(1, 1)] * (view.crops(source.crops_per_picture) * len(samples))
        if recipe.text_cache != "none":
            texts.update(caption for sample in samples for caption in sample.captions)
    stored = needed_bytes(model, crops, sorted(texts), max_tokens, recipe.text_cache, recipe.latents)
    return Forecast(pictures, visits, sum(stored), len(texts))


def _unopened(paths: Sequence[Path]) -> Iterator[Inspected]:
    for path in paths:
        yield Inspected(hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest(), 2**16, 2**16, "")


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
        hint = f"free some, put `cache` on another disk, or use {smaller}"
        needed = f"needs {_told(pictures + text)} (latents {_told(pictures)}, text {_told(text)})"
        told = f"{needed} and {_told(SPARE)} to spare; {_told(free)} free"
        raise DataError(told, where=out, hint=hint)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    values: dict[str, Any] = plainjson.parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def _told(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
