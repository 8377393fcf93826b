"""`libreflux prepare DATA…`: pictures and captions to a cache, before or without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli import terminal
from libreflux.cli.progress import line_width, progress
from libreflux.printing import counted, say
from libreflux.workflows.prepare import PrepareOptions, prepare_with

if TYPE_CHECKING:
    from libreflux.data.summary import SourceSummary


def prepare(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...", help="Folders of captioned pictures, or one recipe (.yaml).", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Cache folder: written, or continued. A recipe names its own.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose VAE and text encoders are used; default: emoji-base.")
    ] = None,
    resolution: Annotated[
        list[int] | None, typer.Option(min=16, help="Side of the crops in pixels; repeatable; default: 128.")
    ] = None,
    crop: Annotated[
        list[str] | None, typer.Option(help="square, aspect or centre; repeatable; default: square.")
    ] = None,
    text_padding: Annotated[str | None, typer.Option(help="drop or trim; default: drop.")] = None,
    text_cache: Annotated[
        str | None,
        typer.Option(help="bf16; int8: half the disk; none: captions are encoded while training; default: bf16."),
    ] = None,
    text_precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32 or bf16: what the text encoders compute in; auto: bf16 on a card; default: auto."
        ),
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(
            help="mean; sample: the standard deviation too, to draw from in training (twice the disk); default: mean."
        ),
    ] = None,
    crops_per_picture: Annotated[
        int | None, typer.Option(min=1, help="Cached crops of each picture; default: 1.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps: where the encoders run; default: auto.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Colour laid under transparent pictures; default: white.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only the i-th of n parts, 1/n to n/n, on as many machines.")
    ] = None,
) -> None:
    """Encode pictures and captions once; run again, it continues or finds nothing left to do.

    Under torchrun each process prepares its own part, on its own card. Parts need no merging: who reads the cache
    reads them all.
    """
    console = terminal.console(err=True)

    def told(found: SourceSummary) -> None:
        for line in found.lines(line_width(console)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    options = PrepareOptions(
        data,
        out=out,
        model=model,
        resolution=resolution or None,
        crop=crop or None,
        text_padding=text_padding,
        text_cache=text_cache,
        text_precision=text_precision,
        latents=latents,
        crops_per_picture=crops_per_picture,
        device=device,
        background=background,
        shard=shard,
        on_source=told,
        progress=lambda what, unit="step": progress(what, unit, console),
    )
    made = prepare_with(options)
    number, parts = made.part
    said = f", part {number + 1} of {parts}" if parts > 1 else ""
    say(f"{counted(made.pictures, 'picture')} prepared in {made.cache}{said}; train with cache={made.cache}")
