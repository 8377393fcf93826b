"""Which models an adapter belongs on: what was merged into a model, and into the one that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libreflux import plainjson
from libreflux.adapter.io import AdapterFile

BASE_LINEAGE = "base_lineage"
"""Key of an adapter's metadata, JSON: the lineage of the model that it was trained on, where adapters are merged in."""


@dataclass(frozen=True)
class Ancestor:
    """A model that another one was made of.

    Attributes:
        sha256: of its weights.
        added: SHA-256 of each adapter that was merged since, and the name of its file.
    """

    sha256: str
    added: dict[str, str]


def ancestors(lineage: Any) -> Iterator[Ancestor]:
    """The models that a model was made of by merging and quantising, the nearest first.

    Args:
        lineage: as in `Facts.lineage`; what is not as `merge` and `export` write it ends the search.
    """
    added: dict[str, str] = {}
    while isinstance(lineage, Mapping) and lineage:
        quantised, base = lineage.get("quantised"), lineage.get("base_sha256")
        if isinstance(quantised, Mapping) and isinstance(sha256 := quantised.get("sha256"), str):
            yield Ancestor(sha256, dict(added))
        rows = lineage.get("adapters")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping) and row.get("sha256"):
                added[str(row["sha256"])] = str(row.get("file", "an adapter"))
        if isinstance(base, str):
            yield Ancestor(base, dict(added))
        lineage = lineage.get(BASE_LINEAGE)


def merged_in(lineage: Any) -> dict[str, str]:
    """SHA-256 of every adapter that is merged into a model, and the name of its file.

    Args:
        lineage: as in `Facts.lineage`.
    """
    found: dict[str, str] = {}
    for one in ancestors(lineage):
        found |= one.added
    return found


def told_lineage(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata of an adapter say of the model that it was trained on; nothing of one without a merge.

    Args:
        lineage: the model's, as in `Facts.lineage`.
    """
    return {BASE_LINEAGE: json.dumps(lineage, sort_keys=True)} if merged_in(lineage) else {}


def lacking(
    sha256: str, lineage: Mapping[str, Any], file: AdapterFile, given: Sequence[AdapterFile]
) -> dict[str, str] | None:
    """What must be added to a model before an adapter belongs on it: SHA-256 of adapters, and their files' names.

    Args:
        sha256: of the model's weights.
        lineage: the model's, as in `Facts.lineage`.
        file: the adapter.
        given: all adapters that are put on the model together.

    Returns:
        Nothing for the model that it was trained on, quantised perhaps, and for one from which that was made, where
        `given` has what was merged; None where the two have nothing to do with each other, as far as is known.
    """
    trained_on = file.metadata.get("model_hash", sha256)
    here = {sha256} | {one.sha256 for one in ancestors(lineage) if not one.added}
    if trained_on in here:
        return {}
    try:
        told = plainjson.parse(file.metadata.get(BASE_LINEAGE, "{}"))
    except ValueError:
        return None
    together = {one.sha256 for one in given}
    for one in ancestors(told):
        if one.sha256 in here:
            return {key: name for key, name in one.added.items() if key not in together}
    return None
