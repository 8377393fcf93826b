"""`libreflux recipe [KEY]`: the keys of a recipe with their meanings and defaults."""

from __future__ import annotations

from typing import Annotated

import typer

from libreflux.cli import terminal
from libreflux.printing import say, say_table


def recipe(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A section or a key, e.g. optimizer.", show_default=False)
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="The keys of inner sections too.")] = False,
) -> None:
    """List the keys that a recipe may have: what each means, and its default."""
    from libreflux.recipe.keys import recipe_keys

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
