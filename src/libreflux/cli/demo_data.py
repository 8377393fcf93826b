"""`libreflux demo-data OUT`: the emoji pictures as an ordinary captioned folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.printing import counted, say
from libreflux.workflows.demo_data import DemoDataOptions, DemoDataResult, demo_data_with


def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds compose other pictures.")] = 0,
    look: Annotated[str, typer.Option(help="plain, or pencil: a look that emoji-base has never seen.")] = "plain",
    pairs: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures with two subjects.")] = 0.2,
) -> None:
    """Write composed emoji pictures with captions: PNG, side-car .txt and metadata.jsonl."""
    from libreflux.cli.progress import progress

    options = DemoDataOptions(out, count=count, seed=seed, look=look, pairs=pairs, progress=progress)
    say_pictures(demo_data_with(options))


def say_pictures(written: DemoDataResult) -> None:
    """Of a folder of pictures that was written."""
    say(f"{counted(written.pictures, 'picture')} with captions in {written.folder}")
