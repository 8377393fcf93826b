"""`libreflux export MODEL --out DIR`: a model in another form, for ourselves in int8 or for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import RecipeError, RunError

PROGRAMS = ("diffusers",)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a name, a folder or a hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must not exist yet.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Its transformer in int8, for libreflux.")] = False,
    program: Annotated[
        str | None, typer.Option("--for", metavar="PROGRAM", help="diffusers: bf16, all parts in the folder.")
    ] = None,
) -> None:
    """Write a model in int8 (half the size, one byte per weight), or as other programs read it."""
    if int8 == (program is not None):
        raise RecipeError("one of them is needed", where="--int8, --for", mend="write --int8 or --for diffusers")
    if program is not None and program not in PROGRAMS:
        raise RecipeError(f"no program {program!r}", where="--for", mend=f"use {', '.join(PROGRAMS)}")
    if out.exists():
        raise RunError("already exists", where=out, mend="choose another name or remove it")

    from libreflux.model.family import open_model, quantise_folder, save_model

    if int8:
        quantise_folder(model, out)
    else:
        save_model(open_model(model, parts=("transformer",), quantise=False), out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    typer.echo(f"{out}, {size / 1e6:,.1f} MB")
