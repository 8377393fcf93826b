"""`libreflux grid PROMPT…`: the same noise by models, steps and guidance scales, as a sheet and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.guidance_options import (
    ApgEta,
    ApgMomentum,
    ApgRadius,
    FirstStepsFrom,
    FirstStepsGuidance,
    NagAlpha,
    NagScale,
    NagTau,
    Rule,
    RuleOption,
    ZeroInit,
)
from libreflux.cli.options import (
    Base,
    ComfyUI,
    Compile,
    CompileOption,
    Offload,
    OffloadBlocksOption,
    OffloadOption,
    QuantizeOption,
    block_number,
)
from libreflux.printing import counted, say
from libreflux.values import number_list


def grid(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False)
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model: a name, a folder or a hub id; may be repeated; default: emoji-libre, or the adapter's."
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="PATH[:WEIGHT]", help="Put on every model; may be repeated."),
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="1,3.5 or 1:6:1", help="Guidance scales; the last one of a range is in it.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="4,28", help="Numbers of sampling steps.")] = None,
    nag: NagScale = 0.0,
    nag_tau: NagTau = None,
    nag_alpha: NagAlpha = None,
    guidance_rule: RuleOption = Rule.cfg,
    apg_eta: ApgEta = None,
    apg_radius: ApgRadius = None,
    apg_momentum: ApgMomentum = None,
    zero_init: ZeroInit = 0,
    first_steps_from: FirstStepsFrom = None,
    first_steps_guidance: FirstStepsGuidance = None,
    seeds: Annotated[str, typer.Option(metavar="0,1 or 0:3", help="Seeds: a row for each, with one noise.")] = "0",
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    width: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: QuantizeOption = None,
    offload: OffloadOption = Offload.auto,
    offload_blocks: OffloadBlocksOption = "0",
    compile: CompileOption = Compile.auto,
    out: Annotated[Path, typer.Option(help="Folder of grid.png, index.html and the cells; continued.")] = Path(
        "out/grid"
    ),
) -> None:
    """Compare models, guidance scales and steps on the same noise. Cells that exist are not drawn again."""
    from libreflux.cli.progress import notice, progress
    from libreflux.workflows.grid import GridOptions, grid_with

    options = GridOptions(
        prompts,
        model=model,
        base=base,
        comfyui=comfyui,
        adapters=adapters or (),
        guidance=None if guidance is None else number_list(guidance, "--guidance"),
        steps=None if steps is None else [int(n) for n in number_list(steps, "--steps", whole=True, least=1)],
        seeds=[int(n) for n in number_list(seeds, "--seeds", whole=True)],
        nag=nag,
        nag_tau=nag_tau,
        nag_alpha=nag_alpha,
        guidance_rule=guidance_rule.as_value,
        apg_eta=apg_eta,
        apg_radius=apg_radius,
        apg_momentum=apg_momentum,
        zero_init=zero_init,
        first_steps_from=first_steps_from,
        first_steps_guidance=first_steps_guidance,
        negative=negative,
        width=width,
        height=height,
        device=device,
        quantize=None if quantize is None else quantize.as_value,
        offload=offload.as_value,
        offload_blocks=block_number(offload_blocks),
        compile=compile.as_value,
        out=out,
        progress=progress,
        on_notice=notice,
    )
    done = grid_with(options)
    say(done.sheet, f"{done.page}, to be looked at; {done.drawn:,} of {counted(done.total, 'cell')} drawn now")
