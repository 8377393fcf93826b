"""Freedom on a terminal: one row a measure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from libreflux.cli import terminal
from libreflux.cli.terminal import SafeConsole
from libreflux.printing import printable
from libreflux.probe.freedom import FreedomRow
from libreflux.probe.words import number, place, title


def print_freedom(rows: Sequence[FreedomRow], family: str = "", console: Console | None = None) -> None:
    """Prints how much of the distance from distilled to reference is closed; intervals hold 95 %.

    Args:
        family: what distances are named after, "emoji" in "FD-emoji".
    """
    table = Table(title="freedom: share of the distance from distilled to reference that is closed")
    table.title_justify = "left"
    subsets = len({row.subset for row in rows}) > 1
    for column in ("measure", "at", *(["subset"] if subsets else [])):
        table.add_column(column)
    for column in ("distilled", "freed", "reference", "freedom [95 % interval]"):
        table.add_column(column, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.name != before:
            table.add_section()
        before = row.name
        name, at = title(row.name, row.at, family)
        values = (number(value) for value in (row.distilled, row.freed, row.reference))
        table.add_row(*map(printable, (name, place(at), *([row.subset] if subsets else []), *values, row.text)))
    # Elsewhere than on a terminal nothing is cut to fit.
    shown = console or terminal.console()
    shown = shown if shown.is_terminal else SafeConsole(file=shown.file, width=160)
    shown.print(table, markup=False)
