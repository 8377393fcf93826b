"""What is missing of a cache → shards: crops through the VAE, captions through the text encoders."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange

from libreflux.data.bar import Bar
from libreflux.data.cache import CacheWriter
from libreflux.data.crops import View, cut
from libreflux.data.pictures import load_rgb
from libreflux.data.sources import Sample
from libreflux.errors import ModelError
from libreflux.model import latents
from libreflux.model.family import Model
from libreflux.model.text import TextEncoders

SHARD_ITEMS = 64  # what a kill can lose
Open = Callable[..., Model]
"""open(parts=(…)) → the model with these parts."""
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Crop:
    """One crop that is to be cached."""

    sample: Sample
    view: View
    index: int
    background: str

    @property
    def name(self) -> str:
        return self.view.name(self.index, self.background)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.view.size(*self.sample.size)


def encode_crops(crops: Sequence[Crop], open_model: Open, writer: CacheWriter, bar: Bar) -> None:
    """Stores the latents of crops, those of one picture in a row; pictures are decoded ahead of the encoder."""
    if not crops:
        return
    model = open_model(parts=("vae",))
    if model.vae is None:
        raise ModelError("this model has no VAE", where=model.name, mend="use a complete model")
    begun = time.monotonic()
    pixels = _cut_ahead(crops)
    done = 0
    for part in _parts(crops):
        found: dict[tuple[str, str], torch.Tensor] = {}
        stds: dict[tuple[str, str], torch.Tensor] = {}
        for crop in part:
            pixel = torch.from_numpy(next(pixels).copy())
            normal = rearrange(pixel, "h w c -> 1 c h w").float() / 127.5 - 1.0
            # One at a time: what is stored depends on its picture alone, not on who shared its batch.
            if writer.wants_std:
                mean, std = latents.posterior(model.vae, normal)
                stds[crop.sample.id, crop.name] = std[0].float().cpu()
            else:
                mean = latents.encode(model.vae, normal)
            found[crop.sample.id, crop.name] = mean[0].float().cpu()
            done += 1
            bar.note = f"{done / max(time.monotonic() - begun, 1e-3):.3g} crops/s"
            bar.advance(1)
        writer.add_latents(found, stds)


def encode_texts(
    texts: Sequence[str], padding: str, max_tokens: int, open_model: Open, writer: CacheWriter, bar: Bar
) -> None:
    """Stores the conditioning of distinct texts."""
    if not texts:
        return
    encoders = open_text(open_model)
    stored = done = 0
    for part in _parts(texts):
        stored += writer.add_texts(part, encoders.encode(part, padding=padding, max_tokens=max_tokens).to("cpu"))
        done += len(part)
        bar.note = f"{stored / done / 1e3:.3g} kB a caption"
        bar.advance(len(part))


def count_tokens(texts: Sequence[str], max_tokens: int, open_model: Open, writer: CacheWriter, bar: Bar) -> None:
    """Notes how long distinct texts are, which the order of training goes by, and stores nothing else of them."""
    if not texts:
        return
    encoders = open_text(open_model)
    for part in _parts(texts, 64 * SHARD_ITEMS):
        writer.add_token_counts(part, encoders.count_tokens(part, max_tokens=max_tokens))
        bar.advance(len(part))


def open_text(open_model: Open) -> TextEncoders:
    """The text encoders of a model.

    Raises:
        ModelError: it has none.
    """
    model = open_model(parts=("text",))
    if model.text is None:
        raise ModelError("this model has no text encoders", where=model.name, mend="use a complete model")
    return model.text


def _cut_ahead(crops: Sequence[Crop]) -> Iterator[np.ndarray]:
    """Each crop's pixels, in order; a few pictures are decoded ahead, each once for all its crops in a row."""
    pictures = [list(group) for _, group in itertools.groupby(crops, lambda crop: (crop.sample.id, crop.background))]
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: deque[Future[list[np.ndarray]]] = deque()
        try:
            for picture in pictures:
                waiting.append(pool.submit(_cut_picture, picture))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _cut_picture(crops: Iterable[Crop]) -> list[np.ndarray]:
    first, *_ = crops
    image = load_rgb(first.sample.path, first.background)
    return [cut(image, crop.view, crop.index, crop.sample.id) for crop in crops]


def _parts(items: Sequence[Item], size: int | None = None) -> Iterator[Sequence[Item]]:
    size = size or SHARD_ITEMS
    for start in range(0, len(items), size):
        yield items[start : start + size]
