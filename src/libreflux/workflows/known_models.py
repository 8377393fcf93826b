"""The models that are known by name: what each is, its size, its licence, and whether it is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = {
    "emoji-base": "the emoji family's base, many steps and true guidance; pictures of 128 px",
    "emoji-schnell": "its 4-step student, distilled as FLUX.1-schnell is",
    "emoji-libre": "that student set free again by this program; what `generate` draws with by default",
    "black-forest-labs/FLUX.1-schnell": "distilled to 1 to 4 steps; what the recipes set free",
    "black-forest-labs/FLUX.1-dev": "guidance-distilled; train it with `guidance` set",
    "jimmycarter/LibreFLUX": "FLUX.1-schnell set free, by the report that this program follows",
    "ostris/OpenFLUX.1": "FLUX.1-schnell without its distillation",
}
FLUX_GB = 34
"""Download of any model of FLUX.1's size in bf16, see `workflows.adapters.FOR_PHOTOGRAPHS`."""


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by name.

    Attributes:
        name: as it is named in a command, a recipe or a call.
        what: what it is, in a sentence without a stop.
        size: bytes; of one that is downloaded, about.
        licence: of its weights.
        embedded: whether it is in this package.
        needs_login: whether the hub asks for a log-in and consent.
        here: whether it can be used without a download.
    """

    name: str
    what: str
    size: float
    licence: str
    embedded: bool = False
    needs_login: bool = False
    here: bool = True


def known_models() -> Iterator[KnownModel]:
    """The emoji family's, then those of the hub; nothing is downloaded."""
    from libreflux.model.facts import KNOWN, needs_login, read_facts
    from libreflux.model.locate import EMOJI, WEIGHTS, stored

    for name in EMOJI:
        folder = WEIGHTS / name
        if folder.is_dir():
            yield KnownModel(name, WORDS[name], _size(folder), read_facts(folder).licence, embedded=True)
    for name, facts in KNOWN.items():
        asks, here = needs_login(name), stored(name)
        yield KnownModel(name, WORDS[name], FLUX_GB * 1e9, facts.licence, needs_login=asks, here=here)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
