"""`libreflux models`: the models that are known by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from libreflux.cli import terminal
from libreflux.printing import say_table

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
"""Download of any model of FLUX.1's size in bf16, see `cli.adapters`."""


def models() -> None:
    """List the models that are known by name: what each is, its size, its licence, and whether it is here."""
    width = terminal.text_width()
    for name, told in _rows():
        say_table(f"{name}\n{terminal.fold(f'    {told}', width, indent='')}")
    text = (
        "Any other diffusers folder of a FLUX.1 model, or hub id ORG/NAME, is taken too. A hub id is downloaded when "
        "you name it yourself; where the hub asks for a log-in: `hf auth login`."
    )
    say_table("\n" + terminal.fold(text, width, indent=""))


def _rows() -> Iterator[tuple[str, str]]:
    from libreflux.model.facts import KNOWN, needs_login, read_facts
    from libreflux.model.locate import EMOJI, WEIGHTS, stored

    for name in EMOJI:
        folder = WEIGHTS / name
        if folder.is_dir():
            megabytes = _size(folder) / 1e6
            yield name, f"{WORDS[name]}. {megabytes:.0f} MB, {read_facts(folder).licence}, in this package"
    for name, facts in KNOWN.items():
        asked = ", asks for a log-in and consent" if needs_login(name) else ""
        here = "here" if stored(name) else "not downloaded"
        yield name, f"{WORDS[name]}. about {FLUX_GB} GB, {facts.licence}{asked}, {here}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
