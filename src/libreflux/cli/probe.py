"""`libreflux probe MODEL`: how free is it?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.errors import RecipeError
from libreflux.printing import say, say_json
from libreflux.values import check_side, number_list

if TYPE_CHECKING:
    from libreflux.cli.probing import Request


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a name, a folder or a hub id.", show_default=False)
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."),
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
        typer.Option(help="Folder of captioned pictures the model was not trained on. [default: the emoji family's]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; continued. [default: out/probe/NAME]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pictures, scales and steps: a first look.")] = False,
    pictures: Annotated[int | None, typer.Option(min=2, help="Held-out pictures, at most.")] = None,
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts to draw, at most.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="G,G,...", help="Guidance scales to draw at. [default: 1,2,3,4,6,8]")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Steps: the first against the others. [default: 4,28,50]")
    ] = None,
    seen: Annotated[
        Path | None, typer.Option(help="Subjects the model was trained on, one a line; default: what it says itself.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Judge of subjects and colours. [default: the emoji family's own]")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Local CLIP, DINO or other vision model for distances, in the judge's place."),
    ] = None,
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

    Interrupted, the same command goes on after the last finished measure.
    """
    if reference is not None and against is None:
        raise RecipeError("needs --against", where="--reference", hint="name the distilled model with --against")
    if features is not None and judge is not None:
        raise RecipeError("takes the place of --judge", where="--features", hint="give one of them")
    if whole and json:
        raise RecipeError("has no effect beside --json", where="--all", hint="remove it: JSON holds every measure")
    check_side(resolution, "--resolution")
    if dtype not in ("stored", "fp32", "bf16"):
        raise RecipeError(f"{dtype!r} is no precision", where="--dtype", hint="use stored, fp32 or bf16")
    scales = None if guidance is None else number_list(guidance, "--guidance", most=1e4)
    counts = None if steps is None else number_list(steps, "--steps", whole=True, least=1, most=1e4)
    chosen = {
        "pictures": pictures, "prompts": prompts, "batch": batch, "resolution": resolution,
        "guidance": scales, "steps": counts and tuple(map(int, counts)),
    }  # fmt: skip

    from libreflux.cli.probing import Request

    request = Request(
        model=model, adapters=adapter or [], data=data, out=out, quick=quick, seen=seen, judge=judge,
        features=features, seed=seed, dtype=dtype, device=device,
        chosen={key: value for key, value in chosen.items() if value is not None},
    )  # fmt: skip
    if against is not None:
        _compare(request, against, reference, as_json=json, whole=whole)
        return

    from libreflux.cli.probe_table import print_summary, print_table
    from libreflux.cli.probing import run
    from libreflux.probing.report.page import write_page

    folder, result = run(request)
    page = write_page([result], folder)
    if json:
        say_json((folder / "probe.json").read_text(encoding="utf-8"))
    else:
        (print_table if whole else print_summary)(result)
        _tell_rest(len(result.measures), whole)
        say(f"{folder / 'probe.json'}, measured in {result.seconds:.0f} s", f"{page}, to be looked at")


def _tell_rest(rows: int, whole: bool) -> None:
    if not whole:
        say(f"--all prints all {rows} rows")


def _compare(request: Request, against: str, reference: str | None, *, as_json: bool, whole: bool) -> None:
    from libreflux.cli.comparing import FREEDOM_FILE, compare
    from libreflux.cli.freedom_table import print_freedom, print_freedom_summary
    from libreflux.probing.report.page import write_page

    found = compare(request, against, reference)
    page = write_page(found.in_order, found.folder, freedom=found.freedom)
    if as_json:
        say_json((found.folder / FREEDOM_FILE).read_text(encoding="utf-8"))
    else:
        show = print_freedom if whole else print_freedom_summary
        show(found.freedom, str((found.result.settings.get("data") or ("",))[0]))
        _tell_rest(len(found.freedom), whole)
        say(found.folder / FREEDOM_FILE, f"{page}, to be looked at")
