"""`libreflux diff A B`: what changed from one model to another, and the change as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import RecipeError
from libreflux.printing import counted, say, say_json

_NOT_HELD = {"bias": ("bias", "biases"), "norm": ("norm", "norms")}


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A model: name, folder, hub id or file.")],
    after: Annotated[
        str, typer.Argument(metavar="B", help="What it became: another model, or an adapter, PATH or PATH:WEIGHT.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the difference as an adapter, with --rank or --factor."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="As a LoRA of this rank.")] = None,
    factor: Annotated[int | None, typer.Option(min=-1, help="As a LoKr of this factor; -1: the most square.")] = None,
    terms: Annotated[
        int, typer.Option(min=1, help="With --factor: sum so many Kronecker products, a file for each in a folder.")
    ] = 1,
    device: Annotated[str, typer.Option(help="What computes an adapter: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    whole: Annotated[bool, typer.Option("--all", help="Print every layer, like ones of all blocks too.")] = False,
) -> None:
    """Tell what changed from one model to another, layer by layer: ||B − A|| / ||A||, Frobenius norms.

    With --out, write the change as the adapter that is nearest to it, and print the error of each layer.
    """
    if whole and json:
        raise RecipeError("has no effect beside --json", where="--all", hint="remove it: JSON holds every tensor")

    import json as plain

    from libreflux.cli.layer_tables import print_changes
    from libreflux.cli.progress import progress
    from libreflux.workflows.diff import DiffOptions, diff_with

    options = DiffOptions(
        before, after, out=out, rank=rank, factor=factor, terms=terms, device=device, progress=progress
    )
    found = diff_with(options)
    if json:
        say_json(plain.dumps(found.as_json(), indent=2))
        return
    print_changes(found.changes, found.errors, whole=whole or bool(found.files))
    if found.files and found.not_held:
        kinds = [one.kind for one in found.not_held]
        told = " and ".join(counted(kinds.count(kind), *names) for kind, names in _NOT_HELD.items() if kind in kinds)
        say(f"not written: {told}, which no adapter can hold")
    if found.files:
        say(f"{counted(found.parameters, 'parameter')}, error {100 * found.error:.3g} % of the change, saved in {out}")
