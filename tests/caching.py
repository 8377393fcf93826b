"""Preparing with the fields of a `CacheSpec` as keywords."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libreflux.data.cache import Cache
from libreflux.data.cache_spec import CacheSpec
from libreflux.data.prepare import Sources
from libreflux.data.prepare import prepare as prepare_spec
from libreflux.recipe import DataSource

_FIELDS = {field.name for field in dataclasses.fields(CacheSpec)}


def prepare(model: str | Path, data: Sequence[DataSource], **options: Any) -> tuple[Cache, Sources]:
    """See `libreflux.data.prepare.prepare`."""
    said = {name: options.pop(name) for name in _FIELDS & options.keys()}
    return prepare_spec(CacheSpec(model=model, data=data, **said), **options)
