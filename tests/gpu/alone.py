"""Processes of their own for what may crash: an illegal memory access spoils a process for all that comes after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent
RESULT = "RESULT "
LAST = 3000  # characters of a log that a failure shows
DEVICE = os.environ.get("LIBREFLUX_TEST_DEVICE", "cuda")
ON_CARD = DEVICE.startswith("cuda")
LIMIT = 180.0 if ON_CARD else 900.0  # seconds


@dataclass(frozen=True)
class Done:
    """What a process ended with; `code` is None for one that ran out of time."""

    code: int | None
    out: str
    err: str

    def log(self) -> str:
        """The last of both."""
        ended = "out of time" if self.code is None else f"exit code {self.code}"
        return f"{ended}\n{self.out[-LAST:]}\n{self.err[-LAST:]}"


def _start(command: list[str], output: int, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, *command], env=full, stdout=output, stderr=output, text=True, start_new_session=True
    )


def process(command: list[str], seconds: float = LIMIT, environment: Mapping[str, str] | None = None) -> Done:
    """Runs a Python command to its end, and its children with it; `environment` is laid over the tests' own."""
    started = _start(command, subprocess.PIPE, environment)
    try:
        out, err = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        out, err = started.communicate()
        return Done(None, out, err)
    return Done(started.returncode, out, err)


def alone(case: str, *, seconds: float = LIMIT, **arguments: Any) -> Any:
    """What the function `gpu.cases.CASE` returns in a process of its own; the test fails with the end of its log.

    Args:
        case: "module.function" of `gpu.cases`.
        seconds: after which it is killed.
        arguments: of the function, as JSON has them; paths become texts.
    """
    done = process(["-m", "gpu.cases", case, json.dumps(arguments, default=str)], seconds)
    lines = [line for line in done.out.splitlines() if line.startswith(RESULT)]
    if done.code != 0 or not lines:
        pytest.fail(f"{case} {arguments}: {done.log()}", pytrace=False)
    return json.loads(lines[-1].removeprefix(RESULT))


def killed(case: str, sign: Path, **arguments: Any) -> None:
    """Starts a case as `alone` does and sends it SIGKILL when the file or folder `sign` appears."""
    started = _start(["-m", "gpu.cases", case, json.dumps(arguments, default=str)], subprocess.DEVNULL)
    until = time.monotonic() + LIMIT
    while not sign.exists() and started.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL, f"{case} was not killed at {sign}"
    assert sign.exists(), f"{case} was not killed at {sign}"


def libreflux(*arguments: object, code: int = 0, seconds: float = LIMIT) -> Done:
    """`libreflux ARGUMENTS` as a user runs it; any other exit code fails the test."""
    done = process(["-m", "libreflux", *map(str, arguments)], seconds)
    if done.code != code:
        pytest.fail(f"libreflux {' '.join(map(str, arguments))}: {done.log()}", pytrace=False)
    return done


@dataclass(frozen=True)
class Capped(Done):
    """A command that ran under a cap; `peak` is the most bytes that torch's allocator had reserved of the card."""

    peak: int = 0


def capped(*arguments: object, cap: int | None, note: Path, seconds: float = LIMIT) -> Capped:
    """`libreflux ARGUMENTS` that may take `cap` bytes of the card, None: all; `note` is a file for its peak."""
    done = process(["-m", "gpu.capped", str(note), str(cap or 0), *map(str, arguments)], seconds)
    peak = int(note.read_text()) if note.exists() else 0
    note.unlink(missing_ok=True)
    return Capped(done.code, done.out, done.err, peak)


def last_line(done: Done) -> str:
    """The refusal that a command ended with: one line on stderr, and no traceback anywhere."""
    assert "Traceback" not in done.out + done.err, done.log()
    refusals = [line for line in done.err.splitlines() if line.startswith("libreflux: error: ")]
    assert len(refusals) == 1, done.log()
    assert done.err.rstrip().endswith(refusals[0]), done.log()
    return refusals[0]
