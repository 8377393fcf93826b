"""`libreflux merge MODEL ADAPTER[:w]… --out DIR`: a new model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.options import Base, ComfyUI
from libreflux.printing import counted, say
from libreflux.workflows.merge import MergeOptions, merge_with


def merge(
    model: Annotated[str, typer.Argument(help="Model to start from: name, folder or hub id.", show_default=False)],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="Adapter files or run folders, and weights (1).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must not exist yet.", show_default=False)],
    base: Base = None,
    comfyui: ComfyUI = None,
) -> None:
    """Add adapters to a model's weights, in fp32, rounded once, and save a new model."""
    made = merge_with(MergeOptions(model, adapters=adapters, out=out, base=base, comfyui=comfyui))
    say(f"{counted(len(made.changed), 'layer')} changed, saved in {made.out}")
