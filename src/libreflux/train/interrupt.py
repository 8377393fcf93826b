"""Stopping safely: SIGINT and SIGTERM ask a run to finish its step and save; a second one stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """A run was stopped by a signal after it had saved; the same command goes on from there.

    Attributes:
        signum: SIGINT or SIGTERM.
        step: finished steps, all of them saved.
        run: the run folder.
        exit_code: 128 + signum (130, 143), what a shell expects of a process that a signal ended.
    """

    def __init__(self, signum: int, step: int, run: Path) -> None:
        self.signum, self.step, self.run = signum, step, run
        self.exit_code = 128 + signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, saved in {run}; the same command resumes it"
        )


class StopRequest:
    """While this context is open, a first SIGINT or SIGTERM only sets `signum`; a second one does what it always did.

    Outside the main thread, where Python allows no signal handlers, it never sets anything.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        # os.write: a handler may run in the middle of anything, a print to the same stream included.
        os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
