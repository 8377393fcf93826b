"""`libreflux inspect layers MODEL`: which layers matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.options import Base, ComfyUI
from libreflux.printing import counted, say, say_json
from libreflux.values import number_list


def layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a name, a folder, a hub id or a file.", show_default=False)
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL|ADAPTER", help="A second model, or an adapter: what changed, layer by layer."),
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of captioned pictures; default: the emoji family's.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures, at most.")] = 16,
    sigmas: Annotated[str, typer.Option(metavar="S,S,...", help="Noise levels, at most five.")] = "0.1,0.3,0.5,0.7,0.9",
    resolution: Annotated[
        int | None,
        typer.Option(min=16, max=8192, help="Side of the pictures in pixels; default: the model's, at most 512."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    budget: Annotated[
        str | None,
        typer.Option(metavar="600M", help="Write an adapter section of so many parameters, spent where they matter."),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="Where the budget goes: distance, centred, gradient, or change (default with --against)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights: stored, fp32 or bf16.")] = "stored",
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Quantise the transformer while it is read. Default: as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; default: out/layers/NAME.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure which layers matter: how far blocks turn the hidden states, gradients, and what changed.

    With --budget, write an adapter section for a recipe.
    """
    from libreflux.cli.progress import progress
    from libreflux.workflows.inspect_layers_options import InspectLayersOptions, check_options

    options = InspectLayersOptions(
        model,
        adapters=adapters or (),
        against=against,
        data=data,
        out=out,
        pictures=pictures,
        sigmas=number_list(sigmas, "--sigmas", most=1.0),
        budget=budget,
        measure=measure,
        resolution=resolution,
        seed=seed,
        dtype=dtype,
        quantize=quantize,
        base=base,
        comfyui=comfyui,
        device=device,
        progress=progress,
    )
    check_options(options)  # before torch is loaded

    from libreflux.workflows.inspect_layers import inspect_layers_with

    found = inspect_layers_with(options)
    if json:
        say_json(found.file.read_text(encoding="utf-8"))
        return
    say(found.headline)
    if found.targets is not None:
        from libreflux.adapter.targets import table
        from libreflux.cli.terminal import console
        from libreflux.printing import say_table

        say_table(table(found.layers, console().width))
        say(f"{found.targets}, an adapter section of {counted(found.parameters, 'parameter')} for a recipe")
    say(f"{found.file}", f"{found.page}, to be looked at")
