"""`libreflux merge MODEL ADAPTER[:w]… --out DIR`: a new model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli.options import Base, ComfyUI
from libreflux.printing import counted, say

if TYPE_CHECKING:
    from libreflux.adapter.rounding import Kept


def merge(
    model: Annotated[str, typer.Argument(help="Model to start from: name, folder or hub id.", show_default=False)],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="Adapter files or run folders, and weights (1).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must not exist yet.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the sum is rounded to: int8, bf16, fp16 or fp32. Default: as the model is stored; of an int8 "
            "model, as its other weights.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    layers: Annotated[bool, typer.Option("--layers", help="List what rounding leaves of each layer's change.")] = False,
) -> None:
    """Add adapters to a model's weights, in fp32, rounded once, and save a new model.

    It tells what rounding leaves of the change, as it is stored and for a recipe that reads it with `base: int8`.
    """
    from libreflux.cli.progress import progress
    from libreflux.workflows.merge import MergeOptions, merge_with

    options = MergeOptions(
        model, adapters=adapters, out=out, dtype=dtype, base=base, comfyui=comfyui, progress=progress
    )
    made = merge_with(options)
    if layers:
        from libreflux.cli.layer_tables import print_roundings

        print_roundings(made.roundings)
    say(f"{counted(len(made.changed), 'layer')} changed, by {made.change:.2%} of their weights, saved in {made.out}")
    say(f"rounded to {made.dtype}: {_told(made.stored)}")
    if made.dtype != "int8":
        say(f"under `base: int8`: {_told(made.in_int8)}")


def _told(left: Kept) -> str:
    return f"{left.share:.1%} of the change is kept, with an error of {left.error:.1%} of it"
