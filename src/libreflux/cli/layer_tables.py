"""What changed in a model, on a terminal: like layers of all blocks on one line, or one line for every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from libreflux.adapter.targets import group, summary
from libreflux.cli import terminal
from libreflux.printing import counted, printable

if TYPE_CHECKING:
    from libreflux.adapter.difference import Change
    from libreflux.adapter.rounding import Rounding


def print_changes(
    changes: Sequence[Change], errors: Mapping[str, float], *, whole: bool, console: Console | None = None
) -> None:
    """Prints the relative changes, the largest first; of biases and norms only those that differ.

    Args:
        changes: of every tensor.
        errors: of what was written, by layer; the column is left out where there are none.
        whole: one line for every tensor, in the model's order.
        console: where to; None: stdout.
    """
    table = Table(title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    for column in ("count", "change", *(["error"] if errors else [])):
        table.add_column(column, justify="right", no_wrap=True)
    shown = [one for one in changes if one.kind == "weight" or one.change]
    for each in [[one] for one in shown] if whole else _grouped(shown):
        name = each[0].name if len(each) == 1 else summary(one.name for one in each)
        of_weights = [errors.get(one.layer) for one in each if one.kind == "weight"]
        told = [percent(value) for value in of_weights if value is not None][:1] if errors else []
        cells = [name, str(len(each)), percent(_together(each)), *(told or [""] if errors else [])]
        table.add_row(*map(printable, cells))
    (console or terminal.console()).print(table, markup=False)
    if same := len(changes) - len(shown):
        (console or terminal.console()).print(f"{counted(same, 'bias or norm', 'biases and norms')} the same")


def print_roundings(roundings: Sequence[Rounding]) -> None:
    """Prints each changed layer: by how much it changed, and what rounding keeps of that and adds to it."""
    table = Table(title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("change", "kept", "error", "int8: kept", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in roundings:
        change = row.change / row.norm if row.norm else math.inf if row.change else 0.0
        values = (change, row.stored.share, row.stored.error, row.int8.share, row.int8.error)
        table.add_row(printable(row.layer), *map(percent, values))
    terminal.console().print(table, markup=False)


def percent(value: float) -> str:
    """A share as text: three digits, "none" for zero."""
    return "none" if value == 0 else "from zero" if math.isinf(value) else f"{100 * value:.3g} %"


def _grouped(changes: Sequence[Change]) -> list[list[Change]]:
    groups: dict[str, list[Change]] = {}
    for one in changes:
        groups.setdefault(group(one.name), []).append(one)
    return sorted(groups.values(), key=lambda each: -_together(each))


def _together(each: Sequence[Change]) -> float:
    from libreflux.adapter.difference import together

    return together(each)
