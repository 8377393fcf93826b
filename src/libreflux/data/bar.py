"""How far preparing is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""progress(done, total, note): the total grows as more is found to do."""


def readable(number: float, digits: int = 3) -> str:
    """A number in so many digits at least, and without the exponent that `g` gives to large ones: 1.23, 12.3, 1,234."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


class Bar:
    """Counts what is done and tells the caller.

    Attributes:
        note: what to show beside the counts.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.note = ""
        self._progress, self._done, self._total = progress, 0, 0

    def expect(self, count: int) -> None:
        """So many more are to be done."""
        self._total += count

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, self._total, self.note)
