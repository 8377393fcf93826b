"""Pictures and captions → cache: everything is read and checked first, then encoded and stored shard by shard.

Running it again continues after a kill and does nothing when all is there; no encoder is loaded that has nothing to
do. Of a cache prepared in n parts each process writes its own folder, and every reader reads all of them as one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from libreflux.data import index as indexing
from libreflux.data.batches import Batches
from libreflux.data.cache import LATENTS, PARTS, Cache, index_folders, writing
from libreflux.data.cache_spec import CacheSpec, spec_of
from libreflux.data.captions import check_weights
from libreflux.data.crops import View, views
from libreflux.data.digests import TEXT_PARTS, VAE_PARTS, FileMemory, encoder_digests
from libreflux.data.encode import Crop, Encoders, count_tokens, encode_crops, encode_texts
from libreflux.data.forecast import check_disk
from libreflux.data.held_out import HeldOut, refuse_trained, split
from libreflux.data.index import INDEX, latents_key, text_key
from libreflux.data.precision import DTYPES, as_settings, dtype_of, resolve
from libreflux.data.progress import Progress, ProgressCount
from libreflux.data.quarantine import report_quarantine
from libreflux.data.repair import forget_damaged, verify
from libreflux.data.sources import Part, Quarantined, Sample, read
from libreflux.data.summary import Told, summarise
from libreflux.data.vocabulary import cuts_untold, tell_cut, tell_foreign
from libreflux.errors import DataError
from libreflux.model.facts import trained_facts
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.model.text import TextConditioning, check_trained_padding
from libreflux.places import folder_place
from libreflux.printing import get_logger
from libreflux.recipe import DataSource, Recipe

logger = get_logger(__name__)

Sources = list[tuple[DataSource, list[Sample]]]
WHOLE: Part = (0, 1)
_AT_ONCE = 2**16


def prepare_recipe(
    recipe: Recipe,
    source: ModelSource | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    told: Told | None = None,
) -> tuple[Batches, HeldOut | None]:
    """Prepares what a recipe needs, its sample prompts too.

    Args:
        recipe: its model, data, held-out pictures, crops, resolutions, latents, text padding, text cache, cache folder
            and seed are used.
        source: the model, where that is open; None: it is opened by its name.
        device: where the encoders run.
        progress: see :func:`prepare`.
        told: likewise.

    Returns:
        The batches of its epochs, and the held-out pictures, which are in none of them; None if it asks for none.

    Raises:
        DataError: also for held-out pictures that are trained on, or a share that holds out nothing or everything.
    """
    source = open_model(recipe.model if source is None else source)
    cache, sources = prepare_cache(recipe, source, device=device, progress=progress, told=told)
    encode = encode_online(source, cache, device) if recipe.text_cache == "none" else None
    wanted, shown = recipe.held_out, views(recipe.crop, recipe.resolution)
    if wanted.path is None:
        trained, held_out = split(sources, wanted.share)
    else:
        trained, held_out = sources[:-1], sources[-1:]
        if not any(samples for _, samples in held_out):
            raise DataError("no picture in it can be used", where=wanted.path, hint="see quarantine.jsonl in the cache")
        refuse_trained(held_out, trained)
    sample = recipe.latents == "sample"  # in training alone: measurements keep to the mean
    batches = Batches(cache, trained, views=shown, seed=recipe.seed, encode=encode, sample=sample)
    if not wanted.chosen:
        return batches, None
    return batches, HeldOut(cache, held_out, view=shown[0], count=wanted.pictures, encode=encode)


def prepare_cache(
    recipe: Recipe,
    source: ModelSource | None = None,
    *,
    device: str = "cpu",
    part: Part = WHOLE,
    progress: Progress | None = None,
    told: Told | None = None,
    read_all: bool = False,
) -> tuple[Cache, Sources]:
    """Prepares what a recipe trains on and holds out, or a part of it; see :func:`prepare`."""
    return prepare(spec_of(recipe, source), device=device, part=part, progress=progress, told=told, read_all=read_all)


def prepare(
    spec: CacheSpec,
    *,
    device: str = "cpu",
    part: Part = WHOLE,
    progress: Progress | None = None,
    told: Told | None = None,
    read_all: bool = False,
) -> tuple[Cache, Sources]:
    """Encodes every crop and every distinct caption that the cache does not hold yet.

    Args:
        spec: what it is to hold.
        device: where the encoders run.
        part: (i, n): encode the i-th of n parts alone, from 0, into a folder of its own in the cache.
        progress: called with (done, total, note), total counting checks and encodings alike.
        told: called with what each source turned out to hold, before anything is encoded.
        read_all: first compare all shards that are there with their checksums, see `repair.verify`.

    Returns:
        The cache, and the usable samples of each source (those of the part).

    Raises:
        DataError: a caption or folder is wrong, too many pictures are, the disk is too small, or the cache was made
            with other settings.
        ModelError: no such model, or a text padding that is not supported.
        RunError: another process is writing the same folder.
    """
    out, text_padding = Path(spec.out), spec.text_padding
    check_trained_padding(text_padding)
    own = _own_folder(out, part)
    source, max_tokens = open_model(spec.model), spec.max_tokens
    folder = source.fetch(*VAE_PARTS, *TEXT_PARTS)
    if max_tokens is None:
        max_tokens = trained_facts(source.facts, text_padding=text_padding).max_tokens
    memory = FileMemory(own, [each for each in index_folders(out) if each != own])
    bar = ProgressCount(progress)
    sources, quarantined = _read(spec, memory, part, bar, told)
    report_quarantine(own, quarantined, sum(len(samples) for _, samples in sources), spec.max_quarantined)
    precision = resolve(spec.text_precision, device, index_folders(out))
    settings = {**encoder_digests(folder, memory), **_settings(spec, max_tokens), **as_settings(precision)}
    wanted = Wanted(sources, spec.views, ["", *spec.prompts] if part[0] == 0 else [], spec.text_cache != "none")
    if read_all:
        _refuse_other_settings(out, settings)  # nothing of another model's cache is removed
        verify(out, own, bar)
        memory.add_sums()
    known = _known(out, settings)
    damaged_rows = known is not None and known.damaged_rows > 0
    todo = wanted.missing(known)
    tell_foreign(folder, [samples for _, samples in sources])
    begun = part == WHOLE or (own / INDEX).is_file()  # a part without a picture of its own is a part too
    if todo or not begun:
        _tell_enlarged(todo.crops)
        sizes = [crop.size for crop in todo.crops]
        check_disk(folder, out, sizes, todo.texts, max_tokens, spec.text_cache, spec.latents)
        with writing(own, settings) as writer, cuts_untold():
            todo = wanted.missing(_known(out, settings))  # another process may have written before our lock
            bar.expect(len(todo.crops) + len(todo.texts) + len(todo.counted))
            memory.save()
            encoders = Encoders(source, device, DTYPES[precision])
            encode_crops(todo.crops, encoders, writer, bar)
            encode_texts(todo.texts, text_padding, max_tokens, encoders, writer, bar)
            count_tokens(todo.counted, max_tokens, encoders, writer, bar)
    memory.save()
    forget_damaged(out, own, rows=damaged_rows)
    cache = Cache(out, partial=part != WHOLE)  # of other parts each is made whole by its own process
    tell_cut([samples for _, samples in sources], wanted.prompts, cache.token_counts, max_tokens)
    return cache, sources


def _own_folder(out: Path, part: Part) -> Path:
    """Where a process writes its part of a cache; raises unless it can, or everything is there already."""
    if out.exists() and not out.is_dir():
        raise DataError("is a file", where=out, hint="name a folder for the cache")
    own = out if part == WHOLE else out / PARTS / f"{part[0]:04d}-of-{part[1]:04d}"
    if not (own / INDEX).is_file():  # a whole cache may be on a disk that is only read
        folder_place(own)
    return own


def _settings(spec: CacheSpec, max_tokens: int) -> dict[str, Any]:
    """Of the settings that a cache keeps, those that its spec decides."""
    return {
        "text_padding": spec.text_padding,
        "max_tokens": max_tokens,
        "precision": "float32",  # of the VAE, and of the text encoders where nothing else is said
        "latents": LATENTS[spec.latents],
        "text": "int8" if spec.text_cache == "int8" else "bfloat16",
    }


def _tell_enlarged(crops: Sequence[Crop]) -> None:
    small = {crop.sample.id for crop in crops if min(crop.sample.size) < min(crop.size)}
    if small:
        logger.warning(
            "%d of %d pictures are smaller than their crops and are enlarged; min_size leaves them out",
            len(small),
            len({crop.sample.id for crop in crops}),
        )


@dataclass(frozen=True)
class Todo:
    """What a cache lacks; false if it lacks nothing.

    Attributes:
        crops: pictures' crops to encode, one picture after another.
        texts: to encode, sorted.
        counted: to count the tokens of alone, sorted.
    """

    crops: list[Crop]
    texts: list[str]
    counted: list[str]

    def __bool__(self) -> bool:
        return bool(self.crops or self.texts or self.counted)


@dataclass(frozen=True)
class Wanted:
    """Everything a cache must hold.

    Attributes:
        sources: with their samples.
        views: of each picture.
        prompts: stored beside the captions, whatever `store_captions` says.
        store_captions: whether captions are stored; False: only their tokens are counted.
    """

    sources: Sources
    views: Sequence[View]
    prompts: Sequence[str]
    store_captions: bool

    def missing(self, cache: Cache | None) -> Todo:
        """What the cache lacks of it; None: there is no cache yet."""
        captions = (caption for _, samples in self.sources for sample in samples for caption in sample.captions)
        none: Iterator[str] = iter(())
        stored = itertools.chain(self.prompts, captions if self.store_captions else none)
        counted = none if self.store_captions else captions
        return Todo(
            self._missing_crops(cache),
            sorted(_absent(stored, cache.stored_texts if cache else None)),
            sorted(_absent(counted, cache.known_texts if cache else None) - set(self.prompts)),
        )

    def _missing_crops(self, cache: Cache | None) -> list[Crop]:
        crops: dict[tuple[str, str], Crop] = {}
        for (source, samples), view in itertools.product(self.sources, self.views):
            for index in range(view.crops(source.crops_per_picture)):
                name = view.name(index, source.background)
                here = np.zeros(len(samples), bool)
                if cache is not None:
                    keys = (latents_key(sample.id, name) for sample in samples)
                    here = cache.sizes(np.fromiter(keys, np.int64, len(samples)))[:, 0] >= 0
                for number in np.flatnonzero(~here).tolist():
                    crop = Crop(samples[number], view, index, source.background)
                    crops.setdefault((crop.sample.id, name), crop)
        # One picture after another: each is opened once.
        return sorted(crops.values(), key=lambda crop: (crop.sample.id, crop.background))


def _absent(texts: Iterator[str], here: Callable[[np.ndarray], np.ndarray] | None) -> set[str]:
    """Those that are not here: of millions that are, no list is made."""
    if here is None:
        return set(texts)
    found: set[str] = set()
    while part := list(itertools.islice(texts, _AT_ONCE)):
        known = here(np.fromiter(map(text_key, part), np.int64, len(part)))
        found.update(text for text, one in zip(part, known.tolist(), strict=True) if not one)
    return found


def _refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    for folder in index_folders(out):
        with indexing.connect(folder) as index:
            if known := indexing.read_settings(index, folder):
                indexing.refuse_other_settings(out, known, settings)


def _known(out: Path, settings: dict[str, Any]) -> Cache | None:
    if not index_folders(out):
        return None
    cache = Cache(out, partial=True)
    if cache.settings:
        cache.check(settings)
    return cache


def _read(
    spec: CacheSpec,
    memory: FileMemory,
    part: Part,
    bar: ProgressCount,
    told: Told | None,
) -> tuple[Sources, list[Quarantined]]:
    sources, quarantined = [], []
    for source in spec.data:
        found = read(source, functools.partial(memory.inspect, bar=bar), part)
        if found.samples and part == WHOLE:
            check_weights(source, found.samples)
        sources.append((source, found.samples))
        quarantined += found.quarantined
        if told is not None:
            told(summarise(source, found, spec.views))
    return sources, quarantined


def encode_online(source: ModelSource, cache: Cache, device: str) -> Callable[[Sequence[str]], TextConditioning]:
    """A function that encodes captions as the cache would; the cache gives the precision and the token counts."""
    encoders = Encoders(source, device, dtype_of(cache.settings))
    text = encoders.open_text()

    def encode(captions: Sequence[str]) -> TextConditioning:
        with encoders.explained_texts(captions), cuts_untold():
            padding, max_tokens = cache.settings["text_padding"], cache.settings["max_tokens"]
            found = text.encode(captions, padding=padding, max_tokens=max_tokens)
            return found.to(device="cpu", dtype=torch.bfloat16)

    return encode
