"""What a section of a probe is: some measures that are made, kept and resumed together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.results import Measure, Picture
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt

SEED_STRIDE = 100_000  # so that probes of other seeds draw from other noise


@dataclass(frozen=True)
class SectionResult:
    """What a section found."""

    measures: list[Measure]
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a section needs: pictures to draw, and other samples that go through the model."""

    drawings: list[PictureBatch] = field(default_factory=list)
    passes: int = 0


@dataclass(frozen=True)
class Section:
    """One group of measures.

    Attributes:
        name: of its file.
        version: of its code; another one makes it anew.
        plan: what it will need, for the time left.
        measure: makes it.
        setting: that asks for it, and that no other section knows of; None: it is always measured.
        code: digest of code outside the package that it runs; "" where there is none.
        drawn: it measures pictures that are drawn by guidance, so that the control by w has it too.
    """

    name: str
    version: int
    plan: Callable[[Settings, Sequence[ParsedPrompt]], Plan]
    measure: Callable[[ProbeContext], SectionResult]
    setting: str | None = None
    code: str = ""
    drawn: bool = False

    def as_control(self) -> Section:
        """The same under a name of its own, so that both are kept."""
        return dataclasses.replace(self, name=f"control-{self.name}")

    def wanted(self, settings: Settings) -> bool:
        """Whether these settings ask for it."""
        return self.setting is None or getattr(settings, self.setting) is not None


def prompted(settings: Settings, prompts: Sequence[ParsedPrompt], guidance: float, steps: int) -> PictureBatch:
    """Every prompt once, from a seed of its own: the same in whatever section asks."""
    seeds = tuple(settings.seed * SEED_STRIDE + index for index in range(len(prompts)))
    return PictureBatch(tuple(one.text for one in prompts), seeds, guidance, steps)
