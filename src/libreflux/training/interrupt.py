"""Stopping safely: SIGINT, SIGTERM and SIGHUP ask a run to finish its step and save; a second one stops it at once.

Windows has SIGBREAK (Ctrl-Break) in SIGHUP's place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from libreflux.errors import remade
from libreflux.printing import hush


class Interrupted(Exception):
    """A run was stopped by a signal after it had saved what was done; the same command goes on from there.

    Attributes:
        signum: one of `SIGNALS`.
        step: finished steps, all of them saved.
        run: the run folder.
        exit_code: 128 + signum (130, 143, 129), what a shell expects of a process that a signal ended.
    """

    def __init__(self, signum: int, step: int, run: Path) -> None:
        self.signum, self.step, self.run = signum, step, run
        self.exit_code = 128 + signum
        name = signal.Signals(signum).name
        if step:
            told = f"stopped by {name} after step {step}, saved in {run}; the same command resumes it"
        else:
            told = f"stopped by {name} before the first step was done; the same command begins again"
        super().__init__(told)

    def __reduce__(self) -> tuple[Any, ...]:
        return remade(self)


if sys.platform == "win32":
    _HANG_UP = None
    ENDING: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGBREAK)
else:
    _HANG_UP = signal.SIGHUP
    ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process, Ctrl-C apart."""
SIGNALS = (signal.SIGINT, *ENDING)


class StopRequest:
    """While this context is open, a first signal of `SIGNALS` only sets `signum`; a second one does what it always did.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. When the terminal hangs up (SIGHUP), nothing more
    is written to it: a write would fail, and cost the very step that is to be saved. Outside the main thread, where
    Python allows no signal handlers, it never sets anything.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._terminals = terminals()
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        if signum == _HANG_UP:
            hush(self._terminals)
        # os.write: a handler may run in the middle of anything, a print to the same stream included.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()


def terminals() -> list[int]:
    """Which of stdout and stderr are a terminal; one that has hung up says that it is none."""
    return [handle for handle in (1, 2) if os.isatty(handle)]


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP end it as Ctrl-C does: what it has half-written goes as it unwinds.

    The exit code is 128 + the signal's number. A second one ends the process at once. Signals that are ignored, or
    handled by somebody else, are left alone; so are all of them outside the main thread.
    """
    seen = terminals()

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        if signum == _HANG_UP:
            hush(seen)
        raise SystemExit(128 + signum)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [one for one in ENDING if signal.getsignal(one) is signal.SIG_DFL]
    for signum in ours:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)
