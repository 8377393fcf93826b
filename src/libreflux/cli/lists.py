"""`libreflux models` and `libreflux recipe [KEY]`: the models that are known by name, and the keys of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli import terminal
from libreflux.printing import say, say_table

if TYPE_CHECKING:
    from libreflux.workflows.known_models import KnownModel


def models() -> None:
    """List the models that are known by name: what each is, its size, its licence, and whether it is here."""
    from libreflux.workflows.known_models import known_models

    width = terminal.text_width()
    for one in known_models():
        say_table(f"{one.name}\n{terminal.fold(f'    {_told(one)}', width, indent='')}")
    text = (
        "Any other diffusers folder of a FLUX.1 model, or hub id ORG/NAME, is taken too. A hub id is downloaded when "
        "you name it yourself; where the hub asks for a log-in: `hf auth login`."
    )
    say_table("\n" + terminal.fold(text, width, indent=""))


def _told(one: KnownModel) -> str:
    if one.embedded:
        return f"{one.what}. {one.size / 1e6:.0f} MB, {one.licence}, in this package"
    login = ", asks for a log-in and consent" if one.needs_login else ""
    here = "here" if one.here else "not downloaded"
    return f"{one.what}. about {one.size / 1e9:.0f} GB, {one.licence}{login}, {here}"


def recipe(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A section or a key, e.g. optimizer.", show_default=False)
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="The keys of inner sections too.")] = False,
) -> None:
    """List the keys that a recipe may have: what each means, and its default."""
    from libreflux.recipe.key_list import recipe_keys

    keys, width = recipe_keys(key, deep=whole), terminal.text_width()
    column = max(len(one.name) for one in keys) + 2
    for one in keys:
        say_table(terminal.two_columns(one.name, one.text, column, width))
    sections = [one.name for one in keys if one.section]
    if sections and not whole:
        say("")
        say_table(
            terminal.fold(f"libreflux recipe KEY lists the keys of {', '.join(sections)}; --all lists all", width)
        )
