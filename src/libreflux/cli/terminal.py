"""rich's tables and bars over `printing`: a console whose texts are printable."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from libreflux.printing import fold as fold
from libreflux.printing import printable


class SafeConsole(Console):
    """rich's console; what a text holds is printable, what rich itself writes (colours, the cursor) is as ever."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable; rich's own control segments are left alone."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)


def console(*, err: bool = False, width: int | None = None) -> SafeConsole:
    """A console on stdout or stderr."""
    return SafeConsole(stderr=err, width=width)


def text_width() -> int:
    """Characters of a line on stdout: of the terminal, of COLUMNS, or 80 where neither says."""
    return max(20, console().width)  # COLUMNS may be 0


def two_columns(name: str, text: str, column: int, width: int) -> str:
    """A name, and beside it a text that goes on below itself; below the name where there is little room for it."""
    column = column if width - column >= 24 else 4
    first = name if column == 4 else name.ljust(column)
    lines = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False) or [""]
    rest = [f"{' ' * column}{line}" for line in lines]
    return "\n".join([first, *rest] if column == 4 else [f"{first}{lines[0]}", *rest[1:]])
