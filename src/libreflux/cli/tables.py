"""A probe's result, and freedom, on a terminal: the headline measures in its width, or one row for every measure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from libreflux.cli import terminal
from libreflux.cli.terminal import SafeConsole
from libreflux.printing import printable
from libreflux.probing.freedom import FreedomRow
from libreflux.probing.no_training import NoTraining
from libreflux.probing.report import few, no_training
from libreflux.probing.report.labels import figure, number, place, title
from libreflux.probing.report.summary import summary
from libreflux.probing.report.trained import distance_rows
from libreflux.probing.results import Result

FREEDOM_TITLE = "freedom: share of the distance from distilled to reference that is closed"


def print_summary(result: Result, console: Console | None = None) -> None:
    """Prints `summary` of a result in the console's width; intervals hold 95 %."""
    table = Table(title=_heading(result), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("measure", overflow="fold")
    for column in ("value [95 % interval]", "theory"):
        table.add_column(column, justify="right")
    for one in summary(result.measures):
        name, at = title(one.name, one.at, str((result.settings.get("data") or ("",))[0]))
        theory = "" if one.reference is None else f"{one.reference:g}"
        table.add_row(*map(printable, (", ".join(filter(None, (name, place(at)))), figure(one), theory)))
    for told, value in [] if result.trained is None else distance_rows(result.trained):
        table.add_row(*map(printable, (told, value, "")))
    (console or terminal.console()).print(table, markup=False)


def print_table(result: Result, console: Console | None = None) -> None:
    """Prints every measure with its interval; intervals hold 95 %."""
    table = Table(title=_heading(result), title_justify="left")
    subsets = len({one.subset for one in result.measures}) > 1
    for column in ("measure", "at", *(["subset"] if subsets else [])):
        table.add_column(column)
    table.add_column("n", justify="right")
    table.add_column("value [95 % interval]", justify="right", no_wrap=True)
    table.add_column("theory", justify="right")
    table.add_column("unit")
    before, order = "", list(dict.fromkeys(one.name for one in result.measures))
    for one in sorted(result.measures, key=lambda one: order.index(one.name)):
        if before and one.name != before:
            table.add_section()
        before = one.name
        theory = "" if one.reference is None else f"{one.reference:g}"
        subset = [one.subset] if subsets else []
        table.add_row(
            *map(printable, (one.name, place(one.at), *subset, *_count(one.count), figure(one), theory, one.unit))
        )
    _add_distances(table, result, subsets)
    _uncut(console).print(table, markup=False)


def print_freedom_summary(
    rows: Sequence[FreedomRow],
    family: str = "",
    console: Console | None = None,
    untrained: NoTraining | None = None,
) -> None:
    """Prints `summary` of the rows in the console's width; intervals hold 95 %.

    Args:
        rows: all of them.
        family: see `print_freedom`.
        console: where to; None: stdout.
        untrained: how much of it needs no training.
    """
    shown = summary(rows)
    table = Table(title=FREEDOM_TITLE, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("measure", overflow="fold")
    for column in ("distilled", "freed", "reference"):
        table.add_column(column, justify="right")
    share = "freedom [95 % interval]" if untrained is None else "freedom [95 %]"
    for column in (share, *no_training.heads(untrained, brief=True)):
        table.add_column(column, justify="right", no_wrap=untrained is not None)
    for row in shown:
        name, at = title(row.name, row.at, family)
        values = (number(value) for value in (row.distilled, row.freed, row.reference))
        controls = no_training.cells(untrained, row, brief=True)
        table.add_row(*map(printable, (", ".join(filter(None, (name, place(at)))), *values, row.text, *controls)))
    (console or terminal.console()).print(table, markup=False)
    _explain(shown, untrained, console)


def print_freedom(
    rows: Sequence[FreedomRow],
    family: str = "",
    console: Console | None = None,
    untrained: NoTraining | None = None,
) -> None:
    """Prints every row: how much of the distance from distilled to reference is closed; intervals hold 95 %.

    Args:
        family: what distances are named after, "emoji" in "FD-emoji".
        untrained: how much of it needs no training.
    """
    table = Table(title=FREEDOM_TITLE)
    table.title_justify = "left"
    subsets = len({row.subset for row in rows}) > 1
    for column in ("measure", "at", *(["subset"] if subsets else [])):
        table.add_column(column)
    columns = ("n", "distilled", "freed", "reference", "freedom [95 % interval]", *no_training.heads(untrained))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.name != before:
            table.add_section()
        before = row.name
        name, at = title(row.name, row.at, family)
        values = (number(value) for value in (row.distilled, row.freed, row.reference))
        subset = [row.subset] if subsets else []
        told = (*_count(row.count), *values, row.text, *no_training.cells(untrained, row))
        table.add_row(*map(printable, (name, place(at), *subset, *told)))
    _uncut(console).print(table, markup=False)
    _explain(rows, untrained, console)


def _explain(rows: Sequence[FreedomRow], untrained: NoTraining | None, console: Console | None) -> None:
    lines = [no_training.STAR] if no_training.is_starred(rows, untrained) else []
    for line in [*lines, *([] if untrained is None else [no_training.explained(untrained)])]:
        (console or terminal.console()).print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _count(count: int | None) -> list[str]:
    return ["" if count is None else str(count)]


def print_few(results: Sequence[Result], console: Console | None = None) -> None:
    """Prints which measures are counted over few pictures or prompts, if any."""
    if told := few.warning(results):
        (console or terminal.console()).print(printable(told), markup=False, highlight=False, soft_wrap=True)


def print_remarks(results: Sequence[Result], console: Console | None = None) -> None:
    """Prints a line for each model of whose training something is known: whether its pictures are held out."""
    for one in results:
        if one.trained is not None:
            text = printable(f"{one.model['name']}: {one.trained.verdict}")
            (console or terminal.console()).print(text, markup=False, highlight=False, soft_wrap=True)


def _add_distances(table: Table, result: Result, subsets: bool) -> None:
    if result.trained is not None:
        table.add_section()
        for told, value in distance_rows(result.trained):
            table.add_row(*map(printable, (told, "", *([""] if subsets else []), "", value, "", "")))


def _heading(result: Result) -> Text:
    remark = f" ({result.remark})" if result.remark else ""
    return Text(printable(f"{result.model['name']}: how free is it?{remark}"))


def _uncut(console: Console | None) -> Console:
    """Elsewhere than on a terminal, one on which nothing is cut to fit."""
    shown = console or terminal.console()
    return shown if shown.is_terminal else SafeConsole(file=shown.file, width=160)
