"""What a training run tells its caller while it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libreflux.data.summary import SourceSummary
    from libreflux.model.finite import NotFiniteError
    from libreflux.probing.held_out import HeldOutTable
    from libreflux.training.callbacks import Started, StepInfo


class TrainEvents:
    """What a run tells of itself while it works. Override what is wanted; by default nothing is told.

    Of several processes the first one tells.
    """

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        """Pictures and captions are being checked and encoded; the total grows as more is found to do."""

    def on_data(self, found: SourceSummary) -> None:
        """A source of pictures and captions was read; nothing of it is encoded yet."""

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        """Something that may take seconds or minutes is done in the block, before the first step."""
        yield

    def on_notice(self, line: str) -> None:
        """Something that a user should know of, such as a check that was passed."""

    def on_start(self, started: Started) -> None:
        """Everything is loaded and the adapter is attached."""

    def on_step(self, info: StepInfo) -> None:
        """An optimizer step is finished, not yet saved."""

    def on_measuring(self, step: int, done: int, total: int) -> None:
        """`done` of `total` held-out pictures are measured after `step` steps."""

    def on_measured(self, step: int, found: HeldOutTable) -> None:
        """The held-out pictures are measured, and the row of RUN/held_out.jsonl is written."""

    def on_sheet(self, step: int, path: Path) -> None:
        """A sample sheet is drawn and written."""

    def on_no_sheet(self, step: int, error: NotFiniteError) -> None:
        """A sample sheet could not be drawn; the run goes on."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self) -> None:
        """Nothing more comes: the run is finished, was stopped, or failed."""
