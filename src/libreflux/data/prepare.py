"""Pictures and captions → cache: everything is read and checked first, then encoded and stored shard by shard.

Running it again continues after a kill and does nothing when all is there; no encoder is loaded that has nothing to
do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange

from libreflux.data.batches import Batches
from libreflux.data.cache import INDEX, Cache, CacheWriter, writing
from libreflux.data.captions import check_weights
from libreflux.data.crops import check_picture, crop_name, load_rgb, square_crop
from libreflux.data.digests import Digests, encoder_digests
from libreflux.data.sources import Sample, read_sources
from libreflux.errors import ModelError
from libreflux.model import family, latents
from libreflux.model.facts import freed
from libreflux.model.text import check_padding
from libreflux.recipe import DataSource, Recipe

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
SHARD_ITEMS = 64  # what a kill can lose

Item = TypeVar("Item")


def prepare_recipe(recipe: Recipe, *, device: str = "cpu", progress: Progress | None = None) -> Batches:
    """Prepares what a recipe trains on, its sample prompts too, and gives the batches of its epochs.

    Args:
        recipe: its model, data, resolution, text padding, cache folder and seed are used.
        device: where the encoders run.
        progress: called with (done, total).
    """
    cache, sources = prepare(
        recipe.model,
        recipe.data,
        resolution=recipe.resolution,
        text_padding=recipe.text_padding,
        out=recipe.cache_dir,
        prompts=recipe.samples.prompts,
        device=device,
        progress=progress,
    )
    return Batches(cache, sources, resolution=recipe.resolution, seed=recipe.seed)


def prepare(
    model: str | Path,
    data: Sequence[DataSource],
    *,
    resolution: int,
    text_padding: str,
    out: Path,
    prompts: Sequence[str] = (),
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Progress | None = None,
) -> tuple[Cache, list[tuple[DataSource, list[Sample]]]]:
    """Encodes every crop and every distinct caption that ``out`` does not hold yet.

    Args:
        model: name, folder or hub id; its VAE and text encoders are used.
        data: the folders.
        resolution: side of the crops in pixels.
        text_padding: "drop" or "trim".
        out: the cache folder.
        prompts: texts to encode besides the captions; the empty prompt always is.
        device: where the encoders run.
        precision: the encoders' dtype, "float32" or "bfloat16". Latents are stored in fp32, text in bf16.
        progress: called with (done, total), total counting checks and encodings alike.

    Returns:
        The cache, and the samples of each source.

    Raises:
        DataError: a picture, caption or folder is wrong (nothing was written), or ``out`` was made with other
            settings.
        ModelError: no such model, or a text padding that is not supported.
        RunError: another process is writing ``out``.
    """
    out = Path(out)
    check_padding(text_padding)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    opened = family.open_model(model, parts=())  # its facts and folder alone
    folder = family.locate(model)
    digests = Digests(out / "digests.json")
    sources = read_sources(data, digests.sha256)
    for source, samples in sources:
        check_weights(source, samples)
    max_tokens = freed(opened.facts).max_tokens
    settings: dict[str, Any] = {
        "schema": 1,
        **encoder_digests(folder, digests),
        "text_padding": text_padding,
        "max_tokens": max_tokens,
        "precision": precision,
        "latents": "float32",
        "text": "bfloat16",
        "crop": "square",
        "resolution": resolution,
    }
    crops, texts = _wanted_crops(sources, resolution), _wanted_texts(sources, prompts)
    if (out / INDEX).is_file():
        crops, texts = _missing(Cache(out, partial=True), settings, crops, texts)
        if not crops and not texts:
            digests.save()
            return Cache(out), sources
    pictures = list(dict.fromkeys(crop.path for crop in crops))
    bar = _Bar(progress, len(pictures) + len(crops) + len(texts))
    _check_pictures(pictures, resolution, bar)
    with writing(out, settings) as writer:
        # Another process may have written between our reading and our lock.
        left_crops, left_texts = _missing(Cache(out, partial=True), settings, crops, texts)
        bar.advance(len(crops) - len(left_crops) + len(texts) - len(left_texts))
        digests.save()
        _encode_crops(left_crops, resolution, model, dtype, device, writer, bar)
        _encode_texts(left_texts, text_padding, max_tokens, model, dtype, device, writer, bar)
    return Cache(out), sources


@dataclass(frozen=True)
class _Crop:
    picture: str
    path: Path
    name: str
    index: int
    background: str


class _Bar:
    """Counts what is done and tells the caller."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, self._total)


def _wanted_crops(sources: Sequence[tuple[DataSource, list[Sample]]], resolution: int) -> list[_Crop]:
    crops: dict[tuple[str, str], _Crop] = {}
    for source, samples in sources:
        for sample in samples:
            for index in range(source.crops_per_picture):
                name = crop_name(resolution, index, source.background)
                crops.setdefault((sample.id, name), _Crop(sample.id, sample.path, name, index, source.background))
    return list(crops.values())


def _wanted_texts(sources: Sequence[tuple[DataSource, list[Sample]]], prompts: Sequence[str]) -> list[str]:
    """Distinct captions, the empty prompt first, in an order that hashing or reading cannot change."""
    captions = {caption for _, samples in sources for sample in samples for caption in sample.captions}
    return ["", *sorted({*captions, *prompts} - {""})]


def _missing(
    cache: Cache, settings: dict[str, Any], crops: list[_Crop], texts: list[str]
) -> tuple[list[_Crop], list[str]]:
    if cache.settings:
        cache.check(settings)
    return (
        [crop for crop in crops if not cache.has_latents(crop.picture, crop.name)],
        [text for text in texts if not cache.has_text(text)],
    )


def _check_pictures(pictures: list[Path], resolution: int, bar: _Bar) -> None:
    small = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            for size in pool.map(check_picture, pictures):
                small += min(size) < resolution
                bar.advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if small:
        logger.warning("%d of %d pictures are smaller than %d px and are enlarged", small, len(pictures), resolution)


def _encode_crops(
    crops: list[_Crop],
    resolution: int,
    model: str | Path,
    dtype: torch.dtype,
    device: str,
    writer: CacheWriter,
    bar: _Bar,
) -> None:
    if not crops:
        return
    vae = family.open_model(model, parts=("vae",), dtype=dtype, device=device).vae
    if vae is None:
        raise ModelError("this model has no VAE", where=model, mend="use a complete model")
    for part in _parts(crops):
        found: dict[tuple[str, str], torch.Tensor] = {}
        image, opened = None, None
        for crop in part:
            if (crop.path, crop.background) != opened:
                image, opened = load_rgb(crop.path, crop.background), (crop.path, crop.background)
            assert image is not None
            pixels = torch.from_numpy(square_crop(image, resolution, crop.index, crop.picture).copy())
            pixels = rearrange(pixels, "h w c -> 1 c h w").float() / 127.5 - 1.0
            # One at a time: what is stored depends on its picture alone, not on who shared its batch.
            found[crop.picture, crop.name] = latents.encode(vae, pixels)[0].float().cpu()
            bar.advance(1)
        writer.add_latents(found)


def _encode_texts(
    texts: list[str],
    text_padding: str,
    max_tokens: int,
    model: str | Path,
    dtype: torch.dtype,
    device: str,
    writer: CacheWriter,
    bar: _Bar,
) -> None:
    if not texts:
        return
    encoders = family.open_model(model, parts=("text",), dtype=dtype, device=device).text
    if encoders is None:
        raise ModelError("this model has no text encoders", where=model, mend="use a complete model")
    for part in _parts(texts):
        text = encoders.encode(part, padding=text_padding, max_tokens=max_tokens)
        writer.add_texts(part, text.to(device="cpu", dtype=torch.bfloat16))
        bar.advance(len(part))


def _parts(items: list[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), SHARD_ITEMS):
        yield items[start : start + SHARD_ITEMS]
