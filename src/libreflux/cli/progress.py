"""Rate and time left of a long job, on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from libreflux.cli import terminal
from libreflux.printing import clock, printable, readable, say
from libreflux.workflows.progress import Report

PLAIN_EVERY = 15.0
"""Seconds between two plain lines."""


def rate(per_second: float, unit: str) -> str:
    """The rate in the unit that keeps it above one: 2.4 steps/s, 3.1 s/step for a slow one."""
    if per_second <= 0:
        return ""
    several = f"{unit}es" if unit.endswith("s") else f"{unit}s"
    return f"{readable(per_second)} {several}/s" if per_second >= 1 else f"{readable(1 / per_second)} s/{unit}"


def notice(line: str) -> None:
    """A line on stderr that a user should see, beside a bar too."""
    say(line, err=True)


def line_width(console: Console | None = None) -> int:
    """Characters of a line on stderr: of the terminal; where there is none, what COLUMNS says, or 200."""
    console = console or terminal.console(err=True)
    return console.width if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else 200


WIDEST_BAR, SHORTEST_BAR, LEAST_NOTE = 40, 10, 8


def fitted(width: int, texts: Mapping[str, str]) -> dict[str, str | int]:
    """What of a progress line fits into `width` characters, a space between two parts, in the order they are shown.

    The count and the time left come first, then the job, a short bar, the rate and the time taken; the note gets what
    they leave, and the bar what the note leaves.

    Args:
        width: of the terminal.
        texts: "what", "count", "rate", "took", "left" and "note"; what is empty takes no place.

    Returns:
        The parts that are shown, and under "bar" its width; the note cut after the last of its parts, between commas,
        that fits.
    """
    sizes = {name: cell_len(text) for name, text in texts.items() if text and name != "note"} | {"bar": SHORTEST_BAR}
    shown: dict[str, str | int] = {}
    room = width + 1
    for name in ("count", "left", "what", "bar", "rate", "took"):
        if name in sizes and sizes[name] + 1 <= room:
            shown[name] = SHORTEST_BAR if name == "bar" else texts[name]
            room -= sizes[name] + 1
    if note := _cut(texts["note"], room - 1):
        shown["note"] = note
        room -= cell_len(note) + 1
    if "bar" in shown:
        shown["bar"] = min(WIDEST_BAR, SHORTEST_BAR + max(0, room))
    return {name: shown[name] for name in ("what", "bar", "count", "rate", "took", "left", "note") if name in shown}


def _cut(note: str, room: int) -> str:
    if cell_len(note) <= room:
        return note
    parts = note.split(", ")
    for count in range(len(parts) - 1, 0, -1):
        if cell_len(whole := ", ".join(parts[:count])) <= room:
            return whole
    return set_cell_size(note, room - 1).rstrip() + "…" if room >= LEAST_NOTE else ""


class _Line(ProgressColumn):
    """The whole line, so that its parts give way to one another in the order that is wanted."""

    def __init__(self, unit: str, console: Console) -> None:
        super().__init__()
        self._unit, self._console = unit, console

    def render(self, task: Task) -> Table:
        left = task.time_remaining
        texts = {
            "what": task.description,
            "count": f"{task.completed:.0f}/{'?' if task.total is None else f'{task.total:.0f}'}",
            "rate": rate(task.finished_speed or task.speed or 0.0, self._unit),
            "took": "took " + clock(task.finished_time if task.finished_time is not None else task.elapsed or 0.0),
            "left": "" if task.finished else f"left {'-:--' if left is None else clock(left)}",
            "note": task.fields["note"],
        }
        line = Table.grid(padding=(0, 1), pad_edge=False)
        cells: list[Text | ProgressBar] = []
        for name, part in fitted(self._console.width, texts).items():
            line.add_column(no_wrap=True)
            if name == "bar":
                total = None if task.total is None else max(0, task.total)
                bar = ProgressBar(
                    total=total,
                    completed=max(0, task.completed),
                    width=int(part),
                    pulse=not task.started,
                    animation_time=task.get_time(),
                )
                cells.append(bar)
            else:
                cells.append(Text(str(part), no_wrap=True))
        line.add_row(*cells)
        return line


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
        The function to call after each unit, see `workflows.progress.Report`.
    """
    console = console or terminal.console(err=True)
    if not console.is_terminal:
        yield _plain(what, unit, console)
        return
    # A redirected stdout stays where it was sent: rich would print it beside the bar, on stderr.
    with Progress(_Line(unit, console), console=console, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=None, note="", visible=False)  # a job that does nothing leaves no bar

        def report(done: int, total: int, note: str = "", begun: bool = False) -> None:
            if begun or (bar.tasks[0].completed == 0 and done > 1):
                bar.reset(task, completed=done, total=total)  # a resumed job: what was done before has no rate
            # The note is printable before its width is measured.
            bar.update(task, completed=done, total=total, note=printable(note), visible=True)

        yield report


def _plain(what: str, unit: str, console: Console) -> Report:
    began = time.monotonic()
    last = began
    first: int | None = None

    def report(done: int, total: int, note: str = "", begun: bool = False) -> None:
        nonlocal last, first, began
        now = time.monotonic()
        if first is None:
            before = begun or done > 1
            first, began = (done if before else 0), (now if before else began)
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
