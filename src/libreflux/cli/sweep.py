"""What `libreflux average RUN --sweep` takes and prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import OptionError
from libreflux.printing import counted, printable, say
from libreflux.values import number_list
from libreflux.workflows.progress import Progress
from libreflux.workflows.sweep_options import SIGMAS, WIDTHS, SweepOptions, check_options

Data = Annotated[
    Path | None,
    typer.Option(help="Folder of captioned pictures to judge on; default: what the run held out, or the emoji."),
]
Report = Annotated[
    Path | None, typer.Option(help="With --sweep: folder of the result, continued; default: out/sweep/NAME.")
]
Lerps = Annotated[
    str | None,
    typer.Option(metavar="A,A,...", help="LERP weights of the newest; default: the report's list, and 0.1."),
]
Widths = Annotated[
    str | None,
    typer.Option(
        metavar="W,W,...",
        help=f"Widths in hindsight; default: of {', '.join(f'{one:g}' for one in WIDTHS)} what can be formed.",
    ),
]
By = Annotated[str | None, typer.Option(metavar="loss|slope", help="What is the best; default: loss.")]
Sigmas = Annotated[
    str | None,
    typer.Option(metavar="S,S,...", help=f"Noise levels; default: {', '.join(f'{one:g}' for one in SIGMAS)}."),
]
Pictures = Annotated[int | None, typer.Option(min=2, help="Pictures to judge on, at most; default: 64.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Drawn by all; may be repeated; default: two of the pictures' captions."),
]
Guidance = Annotated[
    str | None,
    typer.Option(metavar="1:6:1", help="Guidance scales to draw at; default: 1:6:1; none: no sheet."),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1", help="Seeds of each prompt; default: 0.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the adapter's.")]
TrainedOn = Annotated[
    list[str] | None,
    typer.Option(metavar="DIR", help="More runs, caches or folders that were trained on; may be repeated."),
]
Model = Annotated[str | None, typer.Option(help="What the adapters are put on; default: the run's.")]
Resolution = Annotated[
    int | None, typer.Option(min=16, max=8192, help="Side of the pictures in pixels; default: the recipe's.")
]
Batch = Annotated[int | None, typer.Option(min=1, help="Pictures per forward pass; default: 8 (FLUX.1: 1).")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of noise and intervals; default: 0.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps; default: auto.")]


@dataclass(frozen=True)
class SweepArguments:
    """The options as they were typed; None is not given. By their names see `SweepOptions`."""

    data: Path | None
    report: Path | None
    lerps: str | None
    widths: str | None
    by: str | None
    sigmas: str | None
    pictures: int | None
    prompts: list[str] | None
    guidance: str | None
    seeds: str | None
    steps: int | None
    trained_on: list[str] | None
    model: str | None
    resolution: int | None
    batch: int | None
    seed: int | None
    device: str | None

    def given(self) -> Mapping[str, object]:
        """Those that were typed, by their names."""
        return {name: value for name, value in vars(self).items() if value is not None and value != []}

    def refuse(self) -> None:
        """Raises OptionError where one was typed without `--sweep`."""
        for name in self.given():
            raise OptionError("belongs to `sweep`", name, hint="add `sweep`, or remove it")

    def options(self, run: Path, out: Path | None, progress: Progress) -> SweepOptions:
        """As the workflow takes them, each list read."""
        read = dict(self.given())
        for name in ("lerps", "widths", "sigmas", "guidance", "seeds"):
            if isinstance(text := read.get(name), str):
                none = name in ("lerps", "widths", "guidance") and text.strip() == "none"
                found = () if none else number_list(text, f"--{name}", whole=name == "seeds")
                read[name] = tuple(map(int, found)) if name == "seeds" else found
        return SweepOptions(run, out=out, progress=progress, **read)  # type: ignore[arg-type]


def run_sweep(run: Path, out: Path | None, arguments: SweepArguments) -> None:
    """Compares, and prints what was found."""
    from libreflux.cli.progress import progress

    options = arguments.options(run, out, progress)
    check_options(options)  # before torch is loaded

    from rich.table import Table

    from libreflux.cli import terminal
    from libreflux.workflows.sweep import sweep_with
    from libreflux.workflows.sweep_page import difference

    found = sweep_with(options)
    say(found.sentence)
    if found.trained is not None:
        say(found.trained.verdict)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("candidate")
    for column in ("loss" if options.by == "loss" else "|1 - slope|", "to the last [95 %]", "wins"):
        table.add_column(column, justify="right")
    for row in found.rows:
        told = "" if row.is_last else difference(row.to_last)
        table.add_row(*map(printable, (row.name, f"{row.score:.4f}", told, f"{row.wins:.0%}")))
    terminal.console().print(table, markup=False)
    if found.left_out:
        say(f"left out, not to be formed: width {', '.join(f'{one:g}' for one in found.left_out)}")
    say(f"{found.page}, to be looked at; {found.made} of {counted(len(found.rows), 'candidate')} made now")
    if found.out is not None:
        say(f"{found.rows[0].name}, saved in {found.out}")
