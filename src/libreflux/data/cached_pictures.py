"""Which pictures a cache holds crops of: by their ids alone, since it keeps no pixels."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from libreflux.data.cache import index_folders
from libreflux.data.shards import SHARD_NAME, SHARDS
from libreflux.printing import get_logger

logger = get_logger(__name__)

_STD = "std"


def is_cache(folder: Path) -> bool:
    """Whether `prepare` or a run wrote this folder."""
    return bool(index_folders(folder))


def cached_ids(folder: Path) -> set[str]:
    """The ids (`Sample.id`) of all pictures of which a crop is in a cache, its parts included.

    A shard that cannot be read is left out, with a warning.
    """
    return read_ids(folder)[0]


def read_ids(folder: Path) -> tuple[set[str], int]:
    """What `cached_ids` says, and how many shards could not be read."""
    found: set[str] = set()
    unread = 0
    for part in index_folders(folder):
        for path in sorted((part / SHARDS).glob("latents-*.safetensors")):
            if not SHARD_NAME.fullmatch(path.name):
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    parts = [name.split("/") for name in shard.keys()]  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                logger.warning("%s cannot be read (%s): its pictures are not known", path, error)
                unread += 1
                continue
            found.update(names[0] for names in parts if names[0] != _STD)
    return found, unread
