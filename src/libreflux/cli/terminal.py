"""rich's tables and bars over `printing`: a console whose texts are printable."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

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
