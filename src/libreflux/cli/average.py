"""`libreflux average RUN --width 0.08 --out FILE`: another average of a run, after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from libreflux.printing import counted, say
from libreflux.workflows.average import AverageOptions, average_with


def average(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Adapter file to write; it must not exist yet.", show_default=False)],
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
) -> None:
    """Average what a run has kept: any width in hindsight, or LERP over its checkpoints."""
    made = average_with(AverageOptions(run, out=out, width=width, step=step, lerp=lerp))
    say(f"{told_sources(made.steps)}, saved in {made.out}")
    if made.error is not None:
        say(f"profile of width {width:g} reproduced within {made.error:.2%}")
    if len(made.steps) > 1:  # of one there is nothing that differs
        say(f"averaging factors, not products, moved the adapter by {made.gap:.2%} of its norm,")
        say(f"most, {made.worst[1]:.2%}, in {made.worst[0]}")


def told_sources(steps: Sequence[int]) -> str:
    """ "3 sources, steps 2 to 6", of one source its step.

    Args:
        steps: of each source, in order.
    """
    first, last = steps[0], steps[-1]
    span = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return f"{counted(len(steps), 'source')}, {span}"
