"""What a section of a probe is: some measures that are made, kept and resumed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from libreflux.probing.context import Bench
from libreflux.probing.drawing import Wanted
from libreflux.probing.results import Measure, Picture
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import Asked

SEED_STRIDE = 100_000  # so that probes of other seeds draw from other noise


@dataclass(frozen=True)
class Found:
    """What a section found."""

    measures: list[Measure]
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a section needs: pictures to draw, and other samples that go through the model."""

    drawings: list[Wanted] = field(default_factory=list)
    passes: int = 0


@dataclass(frozen=True)
class Section:
    """One group of measures.

    Attributes:
        name: of its file.
        version: of its code; another one makes it anew.
        plan: what it will need, for the time left.
        measure: makes it.
    """

    name: str
    version: int
    plan: Callable[[Settings, Sequence[Asked]], Plan]
    measure: Callable[[Bench], Found]


def prompted(settings: Settings, asked: Sequence[Asked], guidance: float, steps: int) -> Wanted:
    """Every prompt once, from a seed of its own: the same in whatever section asks."""
    seeds = tuple(settings.seed * SEED_STRIDE + index for index in range(len(asked)))
    return Wanted(tuple(one.text for one in asked), seeds, guidance, steps)
