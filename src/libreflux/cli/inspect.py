"""`libreflux inspect`: the group of the verbs that look into a model. Each of them has a file of its own."""

from __future__ import annotations

import typer

from libreflux.cli import inspect_attention, inspect_layers
from libreflux.cli.verb import Verb, Verbs
from libreflux.printing import say_table

group = typer.Typer(cls=Verbs, help="Look into a model: what it looks at, and which of its layers matter.")


@group.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say_table(context.get_help())


group.command("attention", cls=Verb)(inspect_attention.attention)
group.command("layers", cls=Verb)(inspect_layers.layers)
