"""What is missing of a cache → shards: crops through the VAE, captions through the text encoders."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from transformers import PreTrainedTokenizerBase

from libreflux.data.cache import CacheWriter
from libreflux.data.crops import View, cut
from libreflux.data.pictures import load_rgb
from libreflux.data.precision import by_block
from libreflux.data.progress import ProgressCount
from libreflux.data.sources import Sample
from libreflux.model import latents
from libreflux.model import text as text_tokens
from libreflux.model.device import release
from libreflux.model.device_faults import explained
from libreflux.model.source import ModelSource
from libreflux.model.text import TextEncoders
from libreflux.printing import counted, readable

SHARD_ITEMS = 64  # what a kill can lose
_COUNTED_AT_ONCE = 2**12
Items = TypeVar("Items", bound=Sequence[Any] | np.ndarray)


@dataclass(frozen=True)
class Encoders:
    """A model's VAE and text encoders, each opened when its turn comes.

    Attributes:
        source: the model.
        device: where they run.
        text_dtype: of the text encoders; the VAE is fp32.
    """

    source: ModelSource
    device: str
    text_dtype: torch.dtype

    def open_vae(self) -> AutoencoderKL:
        """The VAE.

        Raises:
            ModelError: it has none.
            RunError: no memory for it.
        """
        with explained("opening the VAE", f"free some memory{self._elsewhere}"):
            return self.source.load_vae(dtype=torch.float32, device=self.device)

    def open_text(self) -> TextEncoders:
        """The text encoders, on the device or, in fp32 on a card, beside it.

        Raises:
            ModelError: it has none.
            RunError: no memory for them.
        """
        resting = by_block(self.text_dtype, self.device)
        with explained("opening the text encoders", self._smaller_texts):
            return self.source.load_text(dtype=self.text_dtype, device=self.device, by_block=resting)

    def explained_crop(self, crop: Crop) -> AbstractContextManager[None]:
        """See `device_faults.explained`."""
        width, height = crop.size
        doing = f"encoding a crop of {width} x {height} pixels, {crop.sample.path}"
        return explained(doing, f"a smaller resolution{self._elsewhere}")

    def explained_texts(self, texts: Sequence[str]) -> AbstractContextManager[None]:
        """See `device_faults.explained`."""
        longest = max((len(text) for text in texts), default=0)
        return explained(
            f"encoding {counted(len(texts), 'caption')} of up to {counted(longest, 'character')}", self._smaller_texts
        )

    @property
    def _smaller_texts(self) -> str:
        wide, on_cpu = self.text_dtype == torch.float32, torch.device(self.device).type == "cpu"
        smaller = f"text_precision: {'bf16' if on_cpu else 'fp32 (T5 goes block by block)'}"
        if wide != on_cpu:  # that is what it has already
            smaller = "shorter captions"
        anew = " in another cache" if smaller.startswith("text_precision") else ""
        return f"prepare with {smaller}{anew}{self._elsewhere}"

    @property
    def _elsewhere(self) -> str:
        return "" if torch.device(self.device).type == "cpu" else ", or prepare with device: cpu"


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


def encode_crops(crops: Sequence[Crop], encoders: Encoders, writer: CacheWriter, bar: ProgressCount) -> None:
    """Stores the latents of crops, those of one picture in a row; pictures are decoded ahead of the VAE, which goes."""
    if not crops:
        return
    vae = encoders.open_vae()
    _encode_crops(crops, vae, encoders, writer, bar)
    del vae
    release(encoders.device)


def _encode_crops(
    crops: Sequence[Crop], vae: AutoencoderKL, encoders: Encoders, writer: CacheWriter, bar: ProgressCount
) -> None:
    begun = time.monotonic()
    pixels = _cut_ahead(crops)
    done = 0
    for part in _parts(crops):
        found: dict[tuple[str, str], torch.Tensor] = {}
        stds: dict[tuple[str, str], torch.Tensor] = {}
        for crop in part:
            # One at a time: what is stored depends on its picture alone, not on who shared its batch.
            with encoders.explained_crop(crop):
                pixel = torch.from_numpy(next(pixels).copy())
                normal = rearrange(pixel, "h w c -> 1 c h w").float() / 127.5 - 1.0
                if writer.wants_std:
                    mean, std = latents.posterior(vae, normal)
                    stds[crop.sample.id, crop.name] = std[0].float().cpu()
                else:
                    mean = latents.encode(vae, normal)
                found[crop.sample.id, crop.name] = mean[0].float().cpu()
            done += 1
            bar.note = f"{readable(done / max(time.monotonic() - begun, 1e-3))} crops/s"
            bar.advance(1)
        writer.add_latents(found, stds)


def encode_texts(
    texts: Sequence[str], padding: str, max_tokens: int, encoders: Encoders, writer: CacheWriter, bar: ProgressCount
) -> None:
    """Stores the conditioning of distinct texts, the shortest first; their encoders go afterwards.

    Args:
        texts: in alphabetical order. What a kill leaves is the end of the row, cut into the same shards again.
        padding, max_tokens: see `TextEncoders.encode`.
        encoders: of the model.
        writer: of the cache.
        bar: is told of each shard.
    """
    if not texts:
        return
    order = _by_length(texts, encoders.source.load_t5_tokenizer(), max_tokens)
    text = encoders.open_text()
    stored = done = 0
    for places in _parts(order):
        part = [texts[place] for place in places]
        with encoders.explained_texts(part):
            found = text.encode(part, padding=padding, max_tokens=max_tokens).to("cpu")
        stored += writer.add_texts(part, found)
        done += len(part)
        bar.note = f"{readable(stored / done / 1e3)} kB a caption"
        bar.advance(len(part))
    del text
    release(encoders.device)


def count_tokens(
    texts: Sequence[str], max_tokens: int, encoders: Encoders, writer: CacheWriter, bar: ProgressCount
) -> None:
    """Notes how long distinct texts are, which the order of training goes by, and stores nothing else of them."""
    if not texts:
        return
    tokenizer = encoders.source.load_t5_tokenizer()
    for part in _parts(texts, 64 * SHARD_ITEMS):
        writer.add_token_counts(part, text_tokens.count_tokens(tokenizer, part, max_tokens=max_tokens))
        bar.advance(len(part))


def _by_length(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> np.ndarray:
    """[n] places of the texts, in the order of their token counts; equally long ones stay in theirs."""
    lengths = np.zeros(len(texts), np.int32)  # of millions of texts two numbers each are held
    for start in range(0, len(texts), _COUNTED_AT_ONCE):
        part = texts[start : start + _COUNTED_AT_ONCE]
        lengths[start : start + len(part)] = text_tokens.count_tokens(
            tokenizer, part, max_tokens=max_tokens, warn=False
        )
    return np.argsort(lengths, kind="stable")


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


def _parts(items: Items, size: int | None = None) -> Iterator[Items]:
    size = size or SHARD_ITEMS
    for start in range(0, len(items), size):
        yield items[start : start + size]  # type: ignore[misc]  # a slice is of the same kind
