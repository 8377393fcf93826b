"""How a workflow tells how far it is: the caller's bar, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Report(Protocol):
    """Called after each unit of work."""

    def __call__(self, done: int, total: int, note: str = "", begun: bool = False) -> None:
        """Tell that `done` of `total` units are finished.

        Args:
            done, total: units; the total may grow.
            note: shown beside the counts.
            begun: these were finished before this job began, which has no rate yet.
        """


class Progress(Protocol):
    """Shows one job: a context that gives the function to call after each unit."""

    def __call__(self, what: str, unit: str = "step") -> AbstractContextManager[Report]:
        """Begin to show a job.

        Args:
            what: the job, a word or two, e.g. "drawing".
            unit: one of what is counted, in the singular.
        """


@contextmanager
def silent(what: str, unit: str = "step") -> Iterator[Report]:
    """Shows nothing."""
    yield _nothing


def _nothing(done: int, total: int, note: str = "", begun: bool = False) -> None:
    pass
