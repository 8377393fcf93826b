"""Units of a step → latents and text, out of the cache alone: no picture, no generator state."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.data.cache import Cache
from libreflux.data.captions import CaptionChoice, caption_weights
from libreflux.data.crops import View
from libreflux.data.index import PREPARE_AGAIN, latents_key, text_key
from libreflux.data.order import Samples, Unit
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.model.text import TextConditioning
from libreflux.recipe import DataSource

RAREST = 1e-6  # pictures an epoch; of fewer the numbers of epochs would leave what fp64 tells apart
Encode = Callable[[Sequence[str]], TextConditioning]


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on.

    Attributes:
        latents: [B, C, h, w] fp32, normalised: means as cached, or samples.
        text: B prompts, bf16, without padding.
        sample_ids: the pictures' ids.
        captions: the text of each prompt; "" where it was dropped.
        slots: each picture's slot in its step, see ``order.step_plan``.
        loss_weights: [B] fp32, the ``loss_weight`` of each picture's source.
        regularised: B flags, the ``regularisation`` of each picture's source.
    """

    latents: Tensor
    text: TextConditioning
    sample_ids: tuple[str, ...]
    captions: tuple[str, ...]
    slots: tuple[int, ...]
    loss_weights: Tensor
    regularised: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)


def fingerprint(
    sources: Sequence[tuple[DataSource, Sequence[Sample]]], views: Sequence[View], settings: Mapping[str, Any]
) -> str:
    """SHA-256 over what sample numbers stand for: pictures, captions, repeats, views and the cache's settings."""
    digest = hashlib.sha256()
    for number, (_, samples) in enumerate(sources):
        for sample in samples:
            row = [number, sample.id, sample.captions, sample.kinds, sample.repeats]
            digest.update(json.dumps(row).encode())
    of_sources = [source.model_dump(mode="json", exclude={"path"}) for source, _ in sources]
    of_views = [[view.crop, view.resolution, view.step] for view in views]
    digest.update(json.dumps([of_sources, of_views, settings], sort_keys=True).encode())
    return digest.hexdigest()


class Batches:
    """The samples of a run, addressed by number in [0, len): each picture of each source in each view.

    Args:
        cache: holds every crop and caption.
        sources: each source with its samples, see ``sources.read_source``.
        views: crop and resolution in which every picture is shown, see ``crops.views``.
        seed: the run's; keys caption choice, caption dropout and crop choice by (sample, visit).
        encode: captions → conditioning, for a cache that only counts the tokens of its captions.
        sample: latents are mean + std · eps, with an eps of each visit's own, instead of the mean.

    Raises:
        DataError: something is not in the cache.
    """

    def __init__(
        self,
        cache: Cache,
        sources: Sequence[tuple[DataSource, Sequence[Sample]]],
        *,
        views: Sequence[View],
        seed: int,
        encode: Encode | None = None,
        sample: bool = False,
    ) -> None:
        self._sample = sample
        self.cache, self._seed, self._views = cache, seed, tuple(views)
        self._encode = encode or cache.text
        self._sources = [source for source, _ in sources]
        self._pictures = [sample for _, samples in sources for sample in samples]
        self._source_of = np.repeat(np.arange(len(sources)), [len(samples) for _, samples in sources])
        self._captions = [caption for sample in self._pictures for caption in sample.captions]
        self._choice = self._caption_choice()
        self._tokens = self._count_tokens()
        rates, phases = self._rates()
        count = len(self._views)
        self.samples = Samples(self._buckets(), self._lengths, np.repeat(rates, count), np.repeat(phases, count))
        """What ``order.step_plan`` needs."""

    def __len__(self) -> int:
        """Samples: pictures of all sources, once in each view."""
        return len(self.samples)

    def sequence_lengths(self) -> tuple[int, int]:
        """The fewest and the most tokens, text and image together, that a picture of these brings with it."""
        height, width = np.divmod(self.samples.buckets, 2**16)
        image = height * width // 4
        [empty] = self.cache.token_counts([text_key("")])
        return int(image.min() + min(empty, self._tokens.min())), int(image.max() + max(empty, self._tokens.max()))

    def fingerprint(self) -> str:
        """SHA-256 over what sample numbers stand for; see :func:`fingerprint`."""
        of = itertools.groupby(zip(map(int, self._source_of), self._pictures, strict=True), key=lambda one: one[0])
        samples = {number: [sample for _, sample in rows] for number, rows in of}
        sources = [(source, samples.get(number, [])) for number, source in enumerate(self._sources)]
        return fingerprint(sources, self._views, self.cache.settings)

    def text(self, captions: Sequence[str]) -> TextConditioning:
        """Conditioning of captions of these samples, or of the empty prompt, in this order."""
        return self._encode(captions)

    def batch(self, unit: Unit) -> Batch:
        """The pictures and prompts of one unit.

        Raises:
            ValueError: an empty unit.
            DataError: a damaged cache.
        """
        if not unit.items:
            raise ValueError("an empty unit has no batch; skip it")
        places, dropped = self._chosen(np.array(unit.items), np.array(unit.visits))
        captions = tuple(
            "" if drop else self._captions[place] for place, drop in zip(places.tolist(), dropped.tolist(), strict=True)
        )
        latents, ids, of = [], [], []
        for item, visit in zip(unit.items, unit.visits, strict=True):
            number, view = divmod(item, len(self._views))
            sample, source = self._pictures[number], self._sources[self._source_of[number]]
            crop = self._crop(source, sample, self._views[view], visit)
            latents.append(self._latents(int(self._source_of[number]), sample.id, crop, visit))
            ids.append(sample.id)
            of.append(source)
        return Batch(
            latents=torch.stack(latents),
            text=self.text(captions),
            sample_ids=tuple(ids),
            captions=captions,
            slots=unit.slots,
            loss_weights=torch.tensor([source.loss_weight for source in of]),
            regularised=tuple(source.regularisation for source in of),
        )

    def empty_prompt(self) -> TextConditioning:
        """The prompt that dropped captions become, once."""
        return self._encode([""])

    def _latents(self, source: int, picture: str, crop: str, visit: int) -> Tensor:
        mean = self.cache.latents(picture, crop)
        if not self._sample:
            return mean
        # By the source too: a picture in two of them is two samples, which can meet in one step.
        generator = seeding.generator(self._seed, "posterior", source, picture, visit, crop)
        return mean + self.cache.latent_std(picture, crop) * torch.randn(mean.shape, generator=generator)

    def _crop(self, source: DataSource, sample: Sample, view: View, visit: int) -> str:
        # A keyed start, then in turn: every crop is shown as often as any other.
        crops = view.crops(source.crops_per_picture)
        first = seeding.key(self._seed, "crop", sample.id) % crops
        return view.name((first + visit) % crops, source.background)

    def _chosen(self, items: np.ndarray, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, views = np.divmod(items, len(self._views))
        return self._choice.choose(numbers, visits * len(self._views) + views)

    def _lengths(self, items: np.ndarray, visits: np.ndarray) -> np.ndarray:
        return self._tokens[self._chosen(items, visits)[0]]

    def _caption_choice(self) -> CaptionChoice:
        count = len(self._pictures)
        ids = np.fromiter((int(sample.id[:16], 16) for sample in self._pictures), np.uint64, count)
        lengths = np.fromiter((len(sample.captions) for sample in self._pictures), np.int64, count)
        of = zip(self._source_of, self._pictures, strict=True)
        weights = (caption_weights(self._sources[source], sample) for source, sample in of)
        dropout = np.array([source.caption_dropout for source in self._sources])[self._source_of]
        return CaptionChoice(ids, lengths, weights, dropout, self._seed)

    def _count_tokens(self) -> np.ndarray:
        captions = itertools.chain([""], self._captions)
        counts = self.cache.token_counts(np.fromiter(map(text_key, captions), np.int64, len(self._captions) + 1))
        if counts.min() < 0:
            missing = int(counts.argmin()) - 1  # -1 is the empty prompt
            number = max(0, int(np.searchsorted(self._choice.first, missing, side="right")) - 1)
            raise DataError(
                "a caption of it is not in the cache", where=self._pictures[number].path, hint=PREPARE_AGAIN
            )
        return counts[1:]

    def _rates(self) -> tuple[np.ndarray, np.ndarray]:
        of_source = np.array([source.repeats * source.weight for source in self._sources])
        rates = of_source[self._source_of] * np.array([sample.repeats for sample in self._pictures])
        if len(rates) and rates.sum() < RAREST:
            hint = "raise the weights together: beside one another only their ratios count"
            raise DataError(f"an epoch shows {rates.sum():.3g} pictures on average", where="data.weight", hint=hint)
        phases = np.empty(len(self._pictures))
        for source in range(len(self._sources)):
            mine = self._source_of == source
            count = int(mine.sum())
            # Evenly spread phases: every epoch shows the same number of the source's pictures, give or take one.
            phases[mine] = (seeding.rng(self._seed, "phase", source).permutation(count) + 0.5) / count
        return rates, phases

    def _buckets(self) -> np.ndarray:
        buckets = np.empty((len(self._pictures), len(self._views)), dtype=np.int64)
        for column, view in enumerate(self._views):
            for source in range(len(self._sources)):
                mine = np.flatnonzero(self._source_of == source)
                buckets[mine, column] = self._buckets_of(self._sources[source], mine, view)
        return buckets.reshape(-1)

    def _buckets_of(self, source: DataSource, numbers: np.ndarray, view: View) -> np.ndarray:
        """[n] height × 2¹⁶ + width of these pictures' latents in one view."""
        found = np.zeros(len(numbers), dtype=np.int64)
        for index in range(view.crops(source.crops_per_picture)):
            name = view.name(index, source.background)
            keys = (latents_key(self._pictures[number].id, name) for number in numbers)
            sizes = self.cache.sizes(np.fromiter(keys, np.int64, len(numbers)))
            codes = sizes[:, 0].astype(np.int64) * 2**16 + sizes[:, 1]
            bad = (sizes[:, 0] < 0) | ((codes != found) & (index > 0))
            if bad.any():
                where = self._pictures[numbers[bad.argmax()]].path
                raise DataError("not in the cache", where=where, hint=PREPARE_AGAIN)
            found = codes
        return found
