"""`libreflux demo`: set the distilled emoji model free, and measure and show what that did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.demo_data import say_pictures
from libreflux.printing import say
from libreflux.workflows.demo import PICTURES, STEPS, DemoOptions, demo_with


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps; fewer are faster and free less.")] = STEPS,
    pictures: Annotated[int, typer.Option(min=32, help="Pictures to learn from.")] = PICTURES,
) -> None:
    """The whole story on the emoji family: a distilled model is set free, measured before and after, and shown.

    Interrupted, the same command goes on where it was.
    """
    from libreflux.cli.progress import progress
    from libreflux.cli.train import TrainingDisplay

    shown = TrainingDisplay()
    options = DemoOptions(out, steps, pictures, events=shown, on_part=_say, on_pictures=say_pictures, progress=progress)
    result = demo_with(options)
    if result.training.stopped is not None:
        say(result.training.stopped, err=True)
        sys.exit(result.training.stopped.exit_code)
    _say(f"done in {sum(result.seconds.values()) / 60:.1f} minutes: open {result.page}")


def _say(line: str) -> None:
    say(line, err=True)
