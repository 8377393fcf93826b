"""`libreflux export WHAT --out PATH`: a model or an adapter in another form, for ourselves or for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.options import Base, ComfyUI
from libreflux.cli.progress import progress
from libreflux.printing import say
from libreflux.workflows.export import ExportOptions, export_with


def export(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|ADAPTER]", help="A model, or an adapter file or run folder.", show_default=False
        ),
    ] = None,
    *,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the new model, or .safetensors file; it must not exist yet.", show_default=False),
    ],
    int8: Annotated[bool, typer.Option("--int8", help="A model with its transformer in int8, for libreflux.")] = False,
    program: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PROGRAM",
            help="Of a model: diffusers or bfl; of an adapter: comfyui, diffusers, kohya or lycoris.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the LoRA that every LoKr becomes, for programs that read none.")
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
) -> None:
    """Write a model in int8 (half the size), or a model or an adapter as other programs read it."""
    made = export_with(
        ExportOptions(
            what, out=out, int8=int8, program=program, rank=rank, base=base, comfyui=comfyui, progress=progress
        )
    )
    if rank is not None:
        say(f"LoKr as LoRA of rank {rank}: {made.lost:.1%} of the adapter is lost (Frobenius norm)")
    if made.unread:
        more = f" and {len(made.unread) - 1} more" if len(made.unread) > 1 else ""
        say(f"sd-scripts does not read {made.unread[0]}{more}: that part of the change is lost there")
    if len(made.ranks) > 1:
        say(f"ranks {', '.join(map(str, made.ranks))}: OneTrainer reads a LoRA of one rank only")
    say(f"{made.out}, {made.size / 1e6:,.1f} MB")
