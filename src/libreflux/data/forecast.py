"""How much data a recipe names, before a picture is opened: counts, and the size of the cache to come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from libreflux.data.crops import views
from libreflux.data.disk import needed_bytes
from libreflux.data.pictures import Inspected
from libreflux.data.sources import read_source
from libreflux.recipe import DataSource, Recipe


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
        model: folder; see `disk.needed_bytes`.
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
