"""`libreflux generate PROMPT…`: pictures, with true classifier-free guidance; `--prompts FILE`: a captioned folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Batch,
    ComfyUI,
    Compile,
    CompileOption,
    Offload,
    OffloadBlocksOption,
    OffloadOption,
    QuantizeOption,
    block_number,
)
from libreflux.errors import RecipeError
from libreflux.printing import counted, say
from libreflux.values import number_list

if TYPE_CHECKING:
    from libreflux.workflows.generate_options import DrawingOptions

REMAKE_TAKES = (
    "remake",
    "model",
    "base",
    "comfyui",
    "adapters",
    "first_steps_from",
    "device",
    "offload",
    "offload_blocks",
    "compile",
    "no_metadata",
    "out",
)


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model: a name, a folder or a hub id; default: emoji-libre, or what the adapter is for."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."
        ),
    ] = None,
    prompt_2: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What T5 reads instead, while CLIP reads PROMPT; one for each.", show_default=False
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    negative_2: Annotated[
        str | None,
        typer.Option(help="What T5 reads instead, while CLIP reads the negative prompt.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="T5 tokens that a prompt may have; default: the model's own, the most.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; 0 and 1 are none; default: the model's own.")
    ] = None,
    embedded_guidance: Annotated[
        float | None, typer.Option(min=0, help="Of a guidance-distilled model (FLUX.1-dev); default: the model's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="1,0.75,0.5,0.25",
            show_default=False,
            help="An own ladder instead of --steps: falling, without the last 0; the model's shift applies.",
        ),
    ] = None,
    no_cfg_until: Annotated[int, typer.Option(min=0, help="First steps (a count) that go without guidance.")] = 0,
    guidance_start: Annotated[float, typer.Option(help="Guide from this fraction of the steps on, 0 to 1.")] = 0.0,
    guidance_stop: Annotated[float, typer.Option(help="Guide up to this fraction of the steps, 0 to 1.")] = 1.0,
    guidance_rescale: Annotated[
        float, typer.Option(help="Take back the contrast that guidance adds (Lin et al. 2023): 0 none, 1 all.")
    ] = 0.0,
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
    batch_cfg: Annotated[
        Batch,
        typer.Option(help="Guided steps as one pass (on) or two (off); auto: one where prompts are equally long."),
    ] = Batch.auto,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture.")] = 0,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures per prompt, seeds counting up; default: 1. With --prompts, pictures in all.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    tile: Annotated[
        bool | None,
        typer.Option(
            "--tile/--no-tile", help="Decode in tiles, in less memory; default: above 1536 pixels.", show_default=False
        ),
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: QuantizeOption = None,
    offload: OffloadOption = Offload.auto,
    offload_blocks: OffloadBlocksOption = "0",
    compile: CompileOption = Compile.auto,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --prompts: pictures drawn together, which changes last bits; default: 1.",
            show_default=False,
        ),
    ] = None,
    prompts_from: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Draw a captioned folder: one prompt a line, a metadata.jsonl, or a folder's captions. Resumable.",
            show_default=False,
        ),
    ] = None,
    remake: Annotated[
        Path | None,
        typer.Option(
            metavar="PIC.png", help="Draw this picture again, from what it says of itself.", show_default=False
        ),
    ] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Leave out of the PNG how it was made.")] = False,
    out: Annotated[Path, typer.Option(help="A .png file for one picture, else a folder; replaced.")] = Path("out"),
) -> None:
    """Draw pictures. The same command draws the same bytes, and each PNG says how it was made."""
    from libreflux.cli.progress import notice, progress

    if remake is not None:
        _refuse_beside_remake(context)
        from libreflux.workflows.remake import RemakeOptions, remake_with

        again = RemakeOptions(
            remake,
            model=model,
            base=base,
            comfyui=comfyui,
            adapters=adapters or (),
            first_steps_from=first_steps_from,
            device=device,
            offload=offload.as_value,
            offload_blocks=block_number(offload_blocks),
            compile=compile.as_value,
            metadata=not no_metadata,
            out=out,
            progress=progress,
            on_difference=lambda line: say(f"{remake}: {line}", err=True),
            on_picture=say,
            on_notice=notice,
        )
        say(remake_with(again).comparison, err=True)
        return
    if prompts_from is None:
        if batch is not None:
            raise RecipeError("has no effect without --prompts", where="--batch", hint="remove it")
        if not prompts:
            hint = "quote what to draw, or give --prompts FILE or --remake PIC.png; see libreflux generate --help"
            raise RecipeError("nothing to draw", where="PROMPT", hint=hint)
    for where, given in (("PROMPT", prompts), ("--prompt-2", prompt_2)):
        if prompts_from is not None and given:
            raise RecipeError("has no effect beside --prompts", where=where, hint="give one of them")

    from libreflux.workflows.generate_options import DrawingOptions

    drawing = DrawingOptions(
        model=model,
        base=base,
        comfyui=comfyui,
        adapters=adapters or (),
        negative=negative,
        negative_2=negative_2,
        max_tokens=max_tokens,
        guidance=guidance,
        embedded_guidance=embedded_guidance,
        steps=steps,
        sigmas=None if sigmas is None else number_list(sigmas, "--sigmas", distinct=False),
        no_cfg_until=no_cfg_until,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
        guidance_rescale=guidance_rescale,
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
        batch_cfg=batch_cfg.as_value,
        width=width,
        height=height,
        tile=tile,
        device=device,
        quantize=None if quantize is None else quantize.as_value,
        offload=offload.as_value,
        offload_blocks=block_number(offload_blocks),
        compile=compile.as_value,
        metadata=not no_metadata,
        progress=progress,
        on_notice=notice,
    )
    if prompts_from is not None:
        _draw_folder(drawing, prompts_from, out, count=count, seed=seed, batch=batch or 1)
        return

    from libreflux.workflows.generate import GenerateOptions, generate_with

    one = 1 if count is None else count
    more = {**vars(drawing), "on_picture": say}
    generate_with(GenerateOptions(prompts or (), prompt_2=prompt_2, seed=seed, count=one, out=out, **more))


def _draw_folder(
    drawing: DrawingOptions, prompts_from: Path, out: Path, *, count: int | None, seed: int, batch: int
) -> None:
    """Draws a captioned folder; however it is stopped, says how to go on."""
    from libreflux.workflows.generate_folder import GenerateFolderOptions, generate_folder_with

    shared = vars(drawing)
    options = GenerateFolderOptions(prompts_from, out=out, count=count, seed=seed, batch=batch, **shared)
    try:
        found = generate_folder_with(options)
    except (KeyboardInterrupt, SystemExit):
        there = len(list(out.glob("[0-9]*.png")))
        say(f"stopped: {counted(there, 'picture')} in {out}; the same command goes on from there", err=True)
        raise
    kept = found.pictures - found.drawn
    say(f"{found.folder}: {counted(found.pictures, 'picture')}{f', {kept:,} of them there before' if kept else ''}")


def _refuse_beside_remake(context: typer.Context) -> None:
    """Raises RecipeError for an option whose value the picture itself gives."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name != "DEFAULT" and context.params[name] not in (None, [], ())
        if given and name not in REMAKE_TAKES:
            names = {"prompts": "PROMPT", "prompts_from": "--prompts"}
            what = names.get(name, f"--{name.replace('_', '-')}")
            raise RecipeError("has no effect beside --remake", where=what, hint="remove it: the picture says it")
