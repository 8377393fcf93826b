"""The few measures that a terminal shows first: one or two of each kind, where they tell most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from libreflux.probing.report.labels import MEANINGS
from libreflux.probing.results import Coordinate


class Placed(Protocol):
    """What has a name and a place: a measure, or its freedom."""

    @property
    def name(self) -> str: ...
    @property
    def at(self) -> Mapping[str, Coordinate]: ...
    @property
    def subset(self) -> str: ...


T = TypeVar("T", bound=Placed)

SUMMARY: tuple[tuple[str, Mapping[str, Sequence[Coordinate]]], ...] = (
    ("loss", {"text": ["caption"], "sigma": ["all", 0.9]}),
    ("loss", {"text": ["empty"], "sigma": ["all", 0.9]}),
    ("slope", {"text": ["caption"], "sigma": ["all", 0.9]}),
    ("prompt_gain", {"sigma": [0.9]}),
    ("guidance_response", {"sigma": [0.9]}),
    ("clipped", {"guidance": [4.0]}),
    ("latents_std", {"guidance": [4.0]}),
    ("accuracy", {"what": ["all"], "guidance": [4.0], "steps": []}),
    ("accuracy", {"what": ["all"], "guidance": ["own"], "steps": [4]}),
    ("agreement", {"guidance": [4.0], "steps": []}),
    ("agreement", {"guidance": ["own"], "steps": [4]}),
    ("letters", {"guidance": [4.0], "steps": []}),
    ("letters", {"guidance": ["own"], "steps": [4]}),
    ("distance", {"kind": ["FD"], "guidance": [4.0]}),
    ("best_guidance", {"by": ["accuracy", "agreement"]}),
    ("step_gap", {"steps": [4], "against": [28]}),
    ("straightness", {}),
    ("diversity", {"kind": ["features"], "guidance": [1.0]}),
    ("negative", {"what": ["subject", "velocity"]}),
    ("padding", {"padding": ["drop"]}),
)
"""Of a measure, the values of each coordinate, the best first: words are taken as they are, numbers the nearest."""
OWN: Mapping[str, Sequence[Coordinate]] = {"guidance": [4.0], "steps": []}
"""The same of a measure that a user adds."""


def summary(rows: Sequence[T]) -> list[T]:
    """Of these rows, the one of each line of `SUMMARY` that is nearest to it, each once, over all subjects.

    Of a measure of the user's own the one as of `clipped`.
    """
    found: list[T] = []
    own = [name for name in dict.fromkeys(row.name for row in rows) if name not in MEANINGS]
    lines = [*SUMMARY, *((name, OWN) for name in own if not name.startswith("held_out_"))]
    for name, wanted in lines:
        here = [row for row in rows if row.name == name and row.subset == "all"]
        nearest = min(here, key=lambda row: _distance(row.at, wanted), default=None)
        if nearest is not None and not any(nearest is one for one in found):
            found.append(nearest)
    return found


def _distance(at: Mapping[str, Coordinate], wanted: Mapping[str, Sequence[Coordinate]]) -> list[tuple[int, float]]:
    return [_off(at.get(key), values) for key, values in wanted.items()]


def _off(value: Coordinate | None, wanted: Sequence[Coordinate]) -> tuple[int, float]:
    """(rank of the wish that is met, distance to it); a coordinate without wishes is best left out."""
    for rank, wish in enumerate(wanted):
        if value == wish:
            return rank, 0.0
        if isinstance(wish, int | float) and isinstance(value, int | float):
            return rank, abs(value - wish)
    return len(wanted), 0.0 if value is None else 1.0
