"""Rate and time left of a long job, on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from libreflux.cli import terminal
from libreflux.printing import printable

PLAIN_EVERY = 15.0
"""Seconds between two plain lines."""

Report = Callable[..., None]
"""report(done, total, note=""): `done` of `total` units are finished; `note` is shown beside them."""


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate(per_second: float, unit: str) -> str:
    """The rate in the unit that keeps it above one: 2.4 steps/s, 3.1 s/step for a slow one."""
    if per_second <= 0:
        return ""
    return f"{per_second:.3g} {unit}s/s" if per_second >= 1 else f"{1 / per_second:.3g} s/{unit}"


def line_width(console: Console | None = None) -> int:
    """Characters of a line on stderr: of the terminal, or 400 where there is none."""
    console = console or terminal.console(err=True)
    return console.width if console.is_terminal else 400


class _RateColumn(TextColumn):
    def __init__(self, unit: str) -> None:
        super().__init__("")
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(rate(task.finished_speed or task.speed or 0.0, self.unit))


@contextmanager
def announced(doing: str, after: float = 1.0, console: Console | None = None) -> Iterator[None]:
    """Says what the block does, if that takes long, and then how long it took; on stderr.

    Args:
        doing: e.g. "reading the base model".
        after: seconds until it is said.
        console: where to; None is stderr.
    """
    console = console or terminal.console(err=True)
    told = threading.Event()

    def tell() -> None:
        told.set()
        console.print(f"{doing} …", markup=False, highlight=False, soft_wrap=True)

    began, timer = time.monotonic(), threading.Timer(after, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if told.is_set():
        line = f"{doing}: took {clock(time.monotonic() - began)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, unit: str = "step", console: Console | None = None) -> Iterator[Report]:
    """Show a job's progress while the block runs.

    Args:
        what: the job, a word or two.
        unit: one of what is counted, in the singular.
        console: where to; None is stderr.

    Yields:
        The function to call after each unit, see `Report`.
    """
    console = console or terminal.console(err=True)
    if not console.is_terminal:
        yield _plain(what, unit, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            if bar.tasks[0].completed == 0 and done > 1:
                bar.reset(task, completed=done, total=total)  # a resumed job: what was done before has no rate
            bar.update(task, completed=done, total=total, note=printable(note))  # before its width is measured

        yield report


def _plain(what: str, unit: str, console: Console) -> Report:
    began = time.monotonic()
    last = began
    first: int | None = None

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last, first, began
        now = time.monotonic()
        if first is None:
            first, began = (done if done > 1 else 0), (now if done > 1 else began)
        if done < total and now - last < PLAIN_EVERY:
            return
        last = now
        line = f"{what}: {done}/{total}"
        if done > first and now > began:
            speed = (done - first) / (now - began)
            line += f", {rate(speed, unit)}"
            line += f", {clock((total - done) / speed)} left" if done < total else f", took {clock(now - began)}"
        console.print(line + (f", {note}" if note else ""), markup=False, highlight=False, soft_wrap=True)

    return report
