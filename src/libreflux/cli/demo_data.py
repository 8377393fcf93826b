"""`libreflux demo-data OUT`: the emoji pictures as an ordinary captioned folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import DataError, RecipeError
from libreflux.places import folder_place, new_place
from libreflux.printing import counted, say


def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds compose other pictures.")] = 0,
    look: Annotated[str, typer.Option(help="plain, or pencil: a look that emoji-base has never seen.")] = "plain",
    pairs: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures with two subjects.")] = 0.2,
) -> None:
    """Write composed emoji pictures with captions: PNG, side-car .txt and metadata.jsonl."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise DataError("already exists", where=out, hint="choose another name or remove it")
    if out.is_dir():
        folder_place(out.absolute().parent)  # the finished folder takes its place by a rename
    else:
        new_place(out)
    from libreflux.cli.progress import progress
    from libreflux.emoji import compose
    from libreflux.files import staged_dir

    if look not in compose.LOOKS:
        raise RecipeError(f"no look {look!r}", where="--look", hint=f"use one of {', '.join(compose.LOOKS)}")
    out = out.absolute()
    if out.is_dir():
        try:
            out.rmdir()  # empty: the finished folder takes its place by a rename
        except OSError as error:
            raise DataError(f"cannot be replaced ({error.strerror})", where=out, hint="name a new folder") from None
    with staged_dir(out) as staging, progress("composing", "picture") as report:
        compose.write_folder(staging, count, seed, pairs=pairs, look=look, progress=report)
    say(f"{counted(count, 'picture')} with captions in {out}")
