"""What `libreflux probe --few-steps` takes beside the options of a probe, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from libreflux.errors import OptionError
from libreflux.printing import counted, printable, say, say_json
from libreflux.values import number_list
from libreflux.workflows.few_steps_options import FewStepsOptions, check_options

FewSteps = Annotated[
    bool,
    typer.Option(
        "--few-steps",
        help="Instead: how much of few-step drawing an adapter kept, and how much it learnt of --data; over the "
        "checkpoints of a run as a curve. --prompts FILE has prompts outside of that.",
    ),
]
Broken = Annotated[
    str | None,
    typer.Option(
        metavar="PATH[:WEIGHT]",
        help="With --few-steps: adapter that has lost the few steps, which is 0 % kept; default: noise.",
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="With --few-steps: share below which a training went too far; default: 0.9."),
]


def refuse(broken: str | None, keep: float | None) -> None:
    """Raises OptionError where an option was typed without `--few-steps`."""
    for name, value in (("broken", broken), ("keep", keep)):
        if value is not None:
            raise OptionError("belongs to `few_steps`", name, hint="add `few_steps`, or remove it")


def number_of(prompts: str | None) -> int | None:
    """How many prompts, as it was typed.

    Raises:
        OptionError: no whole number.
    """
    if prompts is None:
        return None
    try:
        return int(prompts)
    except ValueError:
        hint = "use a whole number from 2; a file of prompts goes with `few_steps`"
        raise OptionError(f"cannot be {prompts!r}", "prompts", hint=hint) from None


def one_number(steps: str | None) -> int | None:
    """The number of steps to draw in.

    Raises:
        OptionError: none, or several.
    """
    if steps is None:
        return None
    found = number_list(steps, "--steps", whole=True, least=1)
    if len(found) > 1:
        raise OptionError("takes one number beside `few_steps`", "steps", hint="name the few steps that are meant")
    return int(found[0])


def run(options: FewStepsOptions, *, json: bool) -> None:
    """Checks, and prints what was found."""
    check_options(options)  # before torch is loaded

    from rich.table import Table

    from libreflux.cli import terminal
    from libreflux.workflows.few_steps import probe_few_steps_with

    found = probe_few_steps_with(options)
    if json:
        say_json(found.file.read_text(encoding="utf-8"))
        return
    say(found.stop)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("adapter")
    for column in ("kept [95 %]", "by", "learnt [95 %]", "by"):
        table.add_column(column)
    for one in found.points:
        kept, learnt = one.leading
        table.add_row(*map(printable, (one.name, kept.text, kept.by, learnt.text, learnt.by)))
    terminal.console().print(table, markup=False)
    last = found.points[-1]
    if last.guidance is not None:
        first, second = last.guidance
        say(f"answer to guidance 1 to 3: {second.value:.3f}, distilled {first.value:.3f}")
    made = f"{counted(found.made, 'set')} of pictures drawn now"
    told = [] if options.csv is None else [f"{options.csv}, by prompt"]
    say(f"{found.file}, {made}", f"{found.page}, to be looked at", *told)
