"""Units of a step → latents and text, out of the cache alone: no picture, no encoder, no generator state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from libreflux import keyed
from libreflux.data.cache import MEND, Cache
from libreflux.data.captions import caption_weights, choose
from libreflux.data.crops import crop_name
from libreflux.data.order import Unit
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.model.text import TextConditioning
from libreflux.recipe import DataSource


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on.

    Attributes:
        latents: [B, C, h, w] as cached (fp32), normalised.
        text: B prompts, bf16, without padding.
        sample_ids: the pictures' ids.
        captions: the text of each prompt; "" where it was dropped.
        slots: each picture's slot in its step, see ``order.step_plan``.
    """

    latents: Tensor
    text: TextConditioning
    sample_ids: tuple[str, ...]
    captions: tuple[str, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)


class Batches:
    """The samples of a run, addressed by number in [0, len).

    Args:
        cache: holds every crop and caption.
        sources: each source with its samples, see ``sources.read_sources``.
        resolution: side of the crops in pixels.
        seed: the run's; keys caption choice, caption dropout and crop choice by (sample, visit).

    Raises:
        DataError: something is not in the cache.
    """

    def __init__(
        self, cache: Cache, sources: Sequence[tuple[DataSource, Sequence[Sample]]], *, resolution: int, seed: int
    ) -> None:
        self.cache, self._seed, self._resolution = cache, seed, resolution
        self._items = [
            (source, sample, repeat, caption_weights(source, sample))
            for source, samples in sources
            for sample in samples
            for repeat in range(source.repeats)
        ]
        self._check()

    def __len__(self) -> int:
        """Samples per epoch, repeats counted."""
        return len(self._items)

    def fingerprint(self) -> str:
        """SHA-256 over what sample numbers stand for: pictures, captions, repeats, crops and the cache's settings."""
        items = [
            (sample.id, sample.captions, weights, repeat, source.crops_per_picture, source.background)
            for source, sample, repeat, weights in self._items
        ]
        text = json.dumps([items, self._resolution, self.cache.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def batch(self, unit: Unit) -> Batch:
        """The pictures and prompts of one unit.

        Raises:
            ValueError: an empty unit.
            DataError: a damaged cache.
        """
        if not unit.items:
            raise ValueError("an empty unit has no batch; skip it")
        latents, ids, captions = [], [], []
        for item in unit.items:
            source, sample, repeat, weights = self._items[item]
            visit = unit.epoch * source.repeats + repeat
            # A keyed start, then in turn: every crop is shown as often as any other.
            first = keyed.key(self._seed, "crop", sample.id) % source.crops_per_picture
            crop = crop_name(self._resolution, (first + visit) % source.crops_per_picture, source.background)
            chosen = choose(sample.captions, weights, source.caption_dropout, self._seed, sample.id, visit)
            latents.append(self.cache.latents(sample.id, crop))
            ids.append(sample.id)
            captions.append("" if chosen is None else sample.captions[chosen])
        text = self.cache.text(captions)
        return Batch(torch.stack(latents), text, tuple(ids), tuple(captions), unit.slots)

    def _check(self) -> None:
        for source, sample, _, _ in self._items:
            names = [crop_name(self._resolution, index, source.background) for index in range(source.crops_per_picture)]
            if not all(self.cache.has_latents(sample.id, name) for name in names):
                raise DataError("not in the cache", where=sample.path, mend=MEND)
            if not all(self.cache.has_text(caption) for caption in ("", *sample.captions)):
                raise DataError("a caption of it is not in the cache", where=sample.path, mend=MEND)
