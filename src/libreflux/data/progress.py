"""How far preparing is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""progress(done, total, note): the total grows as more is found to do."""


class ProgressCount:
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
