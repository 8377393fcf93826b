"""`libreflux average RUN --width 0.08 --out FILE`: another average of a run, after training; or `--sweep` over many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli import sweep as sweeping
from libreflux.errors import OptionError
from libreflux.printing import counted, say
from libreflux.workflows.average import AverageOptions, average_with


def average(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Adapter file to write; it must not exist yet. With --sweep: for the best one.")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(help="Relative width (sigma_rel) of a power-function average, 0.01 to 0.28.", show_default=False),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="With --width: at this step instead of the newest.", show_default=False)
    ] = None,
    lerp: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            help="Instead: s = (1 - ALPHA) s + ALPHA new over the checkpoints; ALPHA weighs the NEWEST.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Compare the last checkpoint with many averages, and tell the best.")
    ] = False,
    data: sweeping.Data = None,
    report: sweeping.Report = None,
    lerps: sweeping.Lerps = None,
    widths: sweeping.Widths = None,
    by: sweeping.By = None,
    sigmas: sweeping.Sigmas = None,
    pictures: sweeping.Pictures = None,
    prompts: sweeping.Prompts = None,
    guidance: sweeping.Guidance = None,
    seeds: sweeping.Seeds = None,
    steps: sweeping.Steps = None,
    trained_on: sweeping.TrainedOn = None,
    model: sweeping.Model = None,
    resolution: sweeping.Resolution = None,
    batch: sweeping.Batch = None,
    seed: sweeping.Seed = None,
    device: sweeping.Device = None,
) -> None:
    """Average what a run has kept: any width in hindsight, or LERP over its checkpoints.

    With --sweep, compare many of them on held-out pictures instead.
    """
    arguments = sweeping.SweepArguments(
        data=data,
        report=report,
        lerps=lerps,
        widths=widths,
        by=by,
        sigmas=sigmas,
        pictures=pictures,
        prompts=prompts,
        guidance=guidance,
        seeds=seeds,
        steps=steps,
        trained_on=trained_on,
        model=model,
        resolution=resolution,
        batch=batch,
        seed=seed,
        device=device,
    )
    if sweep:
        for name, value in (("width", width), ("step", step), ("lerp", lerp)):
            if value is not None:
                raise OptionError("makes one average", name, hint=f"remove `sweep`{_plural(name)}")
        sweeping.run_sweep(run, out, arguments)
        return
    arguments.refuse()
    if out is None:
        raise OptionError("is needed", "out", hint="name the adapter file to write")
    made = average_with(AverageOptions(run, out=out, width=width, step=step, lerp=lerp))
    say(f"{told_sources(made.steps)}, saved in {made.out}")
    if made.error is not None:
        say(f"profile of width {width:g} reproduced within {made.error:.2%}")
    if len(made.steps) > 1:  # of one there is nothing that differs
        say(f"averaging factors, not products, moved the adapter by {made.gap:.2%} of its norm,")
        say(f"most, {made.worst[1]:.2%}, in {made.worst[0]}")


def _plural(name: str) -> str:
    return "" if name == "step" else f", or list them with `{name}s`"


def told_sources(steps: Sequence[int]) -> str:
    """ "3 sources, steps 2 to 6", of one source its step.

    Args:
        steps: of each source, in order.
    """
    first, last = steps[0], steps[-1]
    span = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return f"{counted(len(steps), 'source')}, {span}"
