"""Whether prepared data are still what they were, without encoding anything."""

from __future__ import annotations

import functools

from libreflux.data.batches import fingerprint
from libreflux.data.cache import Cache, index_folders
from libreflux.data.crops import views
from libreflux.data.digests import FileMemory, encoder_digests
from libreflux.data.held_out import split
from libreflux.data.index import TEXT_PRECISION
from libreflux.data.precision import as_settings, resolve
from libreflux.data.progress import ProgressCount
from libreflux.data.sources import read_source
from libreflux.model.locate import locate
from libreflux.recipe import Recipe


def data_hash_now(recipe: Recipe) -> str | None:
    """What `Batches.fingerprint` would say of the pictures, captions and encoders that are there now.

    Files that the cache remembers are not opened. Where the cache is gone nothing is known of any, and to read all of
    them could take hours: None.

    Raises:
        DataError: the data cannot be read.
        ModelError: no such model.
    """
    folders = index_folders(recipe.cache_dir)
    if not folders:
        return None
    memory = FileMemory(recipe.cache_dir, [each for each in folders if each != recipe.cache_dir])
    inspect = functools.partial(memory.inspect, bar=ProgressCount())
    sources = [(source, read_source(source, inspect)[0]) for source in recipe.data]
    if recipe.held_out.path is None:
        sources, _ = split(sources, recipe.held_out.share)
    known = Cache(recipe.cache_dir, partial=True).settings | encoder_digests(locate(recipe.model), memory)
    known.pop(TEXT_PRECISION, None)
    settings = known | as_settings(resolve(recipe.text_precision, "cpu", folders))  # "auto" is the cache's own
    return fingerprint(sources, views(recipe.crop, recipe.resolution), settings)
