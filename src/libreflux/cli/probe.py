"""`libreflux probe MODEL`: how free is it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli import few_steps as few
from libreflux.errors import OptionError, RecipeError
from libreflux.printing import say, say_json
from libreflux.values import check_side, number_list


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a name, a folder or a hub id.", show_default=False)
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The distilled model it was freed from (or its probe's folder): freedom."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What a free model is like; default: what the distilled model was distilled from, or theory.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of captioned pictures the model was not trained on; default: the emoji family's."),
    ] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Run, cache or folder of pictures that the model was trained on: measured pictures are looked for in "
            "it; may be repeated. An adapter's own run is known.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; continued; default: out/probe/NAME.")] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was measured of each picture and prompt as CSV."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures, scales and steps: a first look.")] = False,
    pictures: Annotated[int | None, typer.Option(min=2, help="Held-out pictures, at most.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="Prompts to draw, at most. With --few-steps: file of prompts outside of what was learnt.",
        ),
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="G,G,...", help="Guidance scales to draw at; default: 1,2,3,4,6,8.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Steps: the first against the others; default: 4,28,50.")
    ] = None,
    seen: Annotated[
        Path | None, typer.Option(help="Subjects the model was trained on, one a line; default: what it says itself.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Judge of subjects and colours; default: the emoji family's own.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Local CLIP, DINO or other vision model for distances, in the judge's place; a whole CLIP or "
            "SigLIP also for how well pictures agree with their prompts.",
        ),
    ] = None,
    ocr: Annotated[
        bool,
        typer.Option(
            "--ocr",
            help="Read the pictures whose prompts quote a text: share of letters right. Needs the extra `ocr`.",
        ),
    ] = False,
    few_steps: few.FewSteps = False,
    broken: few.Broken = None,
    keep: few.Keep = None,
    resolution: Annotated[
        int | None, typer.Option(min=16, max=8192, help="Side of the pictures in pixels; default: the model's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures per forward pass; by the model's size.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise, pictures and intervals.")] = 0,
    dtype: Annotated[str, typer.Option(help="Weights: stored, fp32 or bf16.")] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON (with --against freedom's), no table.")] = False,
    whole: Annotated[bool, typer.Option("--all", help="Print every measure, not the headline ones alone.")] = False,
) -> None:
    """Measure how free a model is: loss, calibration, guidance, steps, diversity, padding and negative prompts.

    With --against, also which share of the distance from the distilled model to the reference is closed.
    With --few-steps, instead, how much of few-step drawing an adapter kept, and how much it learnt.

    Interrupted, the same command goes on after the last finished measure.
    """
    if whole and json:
        raise RecipeError("has no effect beside --json", where="--all", hint="remove it: JSON holds every measure")
    check_side(resolution, "--resolution")

    from libreflux.cli.progress import progress
    from libreflux.workflows.few_steps_options import FewStepsOptions
    from libreflux.workflows.probe_options import MOST_GUIDANCE, MOST_STEPS, ProbeOptions, check_options

    if few_steps:
        for name, value in (
            ("reference", reference),
            ("quick", quick),
            ("guidance", guidance),
            ("seen", seen),
            ("ocr", ocr),
            ("whole", whole),
        ):
            if value:
                raise OptionError("has no effect beside `few_steps`", name, hint="remove one of them")
        few.run(
            FewStepsOptions(
                model,
                adapters=adapters or (),
                data=data,
                prompts=prompts,
                against=against,
                broken=broken,
                out=out,
                csv=csv,
                pictures=64 if pictures is None else pictures,
                steps=few.one_number(steps),
                keep=0.9 if keep is None else keep,
                judge=judge,
                features=features,
                trained_on=trained_on or (),
                resolution=resolution,
                batch=batch,
                seed=seed,
                dtype=dtype,
                device=device,
                progress=progress,
            ),
            json=json,
        )
        return
    few.refuse(broken, keep)
    scales = None if guidance is None else number_list(guidance, "--guidance", most=MOST_GUIDANCE)
    counts = None if steps is None else number_list(steps, "--steps", whole=True, least=1, most=MOST_STEPS)
    options = ProbeOptions(
        model,
        adapters=adapters or (),
        against=against,
        reference=reference,
        data=data,
        trained_on=trained_on or (),
        out=out,
        csv=csv,
        quick=quick,
        pictures=pictures,
        prompts=few.number_of(prompts),
        guidance=scales,
        steps=None if counts is None else [int(count) for count in counts],
        seen=seen,
        judge=judge,
        features=features,
        ocr=ocr,
        resolution=resolution,
        batch=batch,
        seed=seed,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    check_options(options)  # before torch is loaded

    from libreflux.cli import tables
    from libreflux.workflows.probe import probe_with

    found = probe_with(options)
    if json:
        say_json(found.file.read_text(encoding="utf-8"))
        return
    if found.freedom is None:
        (tables.print_table if whole else tables.print_summary)(found.result)
    else:
        family = str((found.result.settings.get("data") or ("",))[0])
        shown = tables.print_freedom if whole else tables.print_freedom_summary
        shown(found.freedom, family, untrained=found.untrained)
        tables.print_remarks(found.in_order)
    tables.print_few([found.result])
    if not whole:
        rows = len(found.result.measures if found.freedom is None else found.freedom)
        say(f"--all prints all {rows} rows")
    took = f", measured in {found.result.seconds:.0f} s" if found.freedom is None else ""
    say(f"{found.file}{took}", f"{found.page}, to be looked at", *([] if csv is None else [f"{csv}, by picture"]))
