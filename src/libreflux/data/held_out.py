"""Pictures that are never trained on, chosen by their content: no other picture's coming or going moves one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from libreflux import seeding
from libreflux.data.batches import Batch, Batches, Encode
from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.order import Unit
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.model.text import TextConditioning
from libreflux.recipe import DataSource

Sources = list[tuple[DataSource, list[Sample]]]


def places(sample_ids: Sequence[str]) -> np.ndarray:
    """[n] fp64 in [0, 1), uniform: a function of each picture's bytes alone, the same in every run.

    A share s holds out the pictures whose place is below s, so a larger share holds out those of a smaller one too.
    """
    digits = np.fromiter((int(name[:16], 16) for name in sample_ids), np.uint64, len(sample_ids))
    return seeding.uniforms(0, "held-out", digits, np.zeros(len(digits), np.uint64), 1)[:, 0]


def split(sources: Sources, share: float) -> tuple[Sources, Sources]:
    """(trained, held out): every source on both sides; a picture in several sources is on one side with all of them.

    Raises:
        DataError: a share above zero holds out nothing, or all of a source.
    """
    trained, held_out = Sources(), Sources()
    for source, samples in sources:
        below = places([sample.id for sample in samples]) < share
        trained.append((source, [sample for sample, held in zip(samples, below, strict=True) if not held]))
        held_out.append((source, [sample for sample, held in zip(samples, below, strict=True) if held]))
        if samples and below.all():
            hint = "lower held_out.share, or put more pictures there"
            raise DataError(f"held_out.share {share:g} leaves none of its pictures", where=source.path, hint=hint)
    if share > 0 and not any(samples for _, samples in held_out):
        count = sum(len(samples) for _, samples in sources)
        hint = "raise it, name another folder in held_out.path, or set held_out.share to 0"
        raise DataError(f"{share:g} of {count} pictures holds out none", where="held_out.share", hint=hint)
    return trained, held_out


def refuse_trained(held_out: Sources, trained: Sources) -> None:
    """Raises DataError if a picture is on both sides, to the byte."""
    apart = {sample.id: sample for _, samples in held_out for sample in samples}  # the fewer of the two
    for _, samples in trained:
        for sample in samples:
            if twin := apart.get(sample.id):
                told = f"the same picture as {sample.path}, which is trained on"
                raise DataError(told, where=twin.path, hint="remove one of them")


class HeldOut:
    """Held-out pictures with one crop and one caption each: those of a first visit, without caption dropout.

    Args:
        cache: holds every crop and caption.
        sources: each source with its held-out samples; of a picture in several the first counts.
        view: crop and resolution that they are measured in.
        count: at most so many pictures; the choice among more is by their `places`.
        encode: captions → conditioning, for a cache that only counts the tokens of its captions.

    Raises:
        DataError: something is not in the cache.
    """

    def __init__(self, cache: Cache, sources: Sources, *, view: View, count: int, encode: Encode | None = None) -> None:
        every_one = {"caption_dropout": 0.0, "weight": 1.0}
        prompted = [(source.model_copy(update=every_one), samples) for source, samples in sources]
        # Seed 0, not the run's: runs of other seeds see the same crops and captions.
        self._batches = Batches(cache, prompted, views=[view], seed=0, encode=encode)
        ids = [sample.id for _, samples in sources for sample in samples]
        distinct, first = np.unique(ids, return_index=True)
        self._items = first[np.argsort(places(distinct.tolist()))][:count]
        self.sample_ids = tuple(ids[item] for item in self._items)
        """The pictures' ids."""
        everyone = [sample for _, samples in sources for sample in samples]
        self.paths = tuple(everyone[item].path for item in self._items)
        """A file of each of them."""

    def __len__(self) -> int:
        return len(self._items)

    def empty_prompt(self) -> TextConditioning:
        """One empty prompt."""
        return self._batches.text([""])

    def batches(self, size: int) -> Iterator[Batch]:
        """All pictures, `size` at most at a time, those of one shape and of like caption lengths together."""
        samples, visits = self._batches.samples, np.zeros(len(self._items), np.int64)
        buckets, lengths = samples.buckets[self._items], samples.lengths(self._items, visits)
        order = np.lexsort((lengths, buckets))
        edges = np.flatnonzero(np.diff(buckets[order])) + 1
        for group in np.split(self._items[order], edges):
            for start in range(0, len(group), size):
                yield self._batches.batch(_unit(tuple(group[start : start + size].tolist())))


def _unit(items: tuple[int, ...]) -> Unit:
    count = len(items)
    return Unit(0, 0, 0, 0, items, (0,) * count, tuple(range(count)), count)
