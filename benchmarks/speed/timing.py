"""Contenders that do the same work take turns; of each: seconds by round, peak memory, operations dispatched.

In every round each contender runs once, and the order moves on by one from round to round, so that a machine that is
busy for a while slows all of them. Ratios are therefore of two contenders within one round, and the median over rounds.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed.operations import Operations
from benchmarks.speed.ratios import Measured

LEAST_ROUNDS, ENOUGH = 2, 90.0
"""On a slow machine rounds after the second are left out once a group has taken so many seconds."""
Run = Callable[[], Mapping[str, float] | None]
"""Does the work once; may return seconds of named parts of it."""


@dataclass(frozen=True)
class Contender:
    """One way to do a row's work.

    Attributes:
        name: as tables show it.
        make: builds what the work needs and returns the work. An ImportError skips the contender by name.
        ours: whether a failure is ours: others' may fail, and the table then says why.
        bytes: that it holds, about; contenders that do not fit together are measured in groups.
        counted: whether its operations can be counted: not those inside other libraries' tensors or compiled blocks.
        elsewhere: whether the work is done in another process, whose memory is not measured.
    """

    name: str
    make: Callable[[], Run]
    ours: bool = False
    bytes: float = 0.0
    counted: bool = True
    elsewhere: bool = False


def groups(contenders: Sequence[Contender], room: float) -> list[list[Contender]]:
    """Those that fit into `room` bytes together; the first one is in each group, to compare the groups through it."""
    first, *rest = contenders
    found = [[first]]
    for one in rest:
        if len(found[-1]) > 1 and sum(each.bytes for each in (*found[-1], one)) > room:
            found.append([first])
        found[-1].append(one)
    return found


def take_turns(contenders: Sequence[Contender], *, rounds: int, device: str, room: float) -> list[Measured]:
    """Measures all contenders in turn; a round before those that are timed warms up and counts operations.

    Args:
        contenders: the first one is measured in each group.
        rounds: that are timed, at most; at least `LEAST_ROUNDS`.
        device: cpu or cuda.
        room: bytes that contenders may hold together, see `groups`.
    """
    found = {one.name: Measured(one.name, one.ours) for one in contenders}
    for number, group in enumerate(groups(contenders, room)):
        _measure_group(group, found, rounds, device, str(number))
        free(device)
    return list(found.values())


def _measure_group(group: Sequence[Contender], found: dict[str, Measured], rounds: int, device: str, name: str) -> None:
    runs: dict[str, Run] = {}
    held: dict[str, int] = {}
    elsewhere = {one.name: one.elsewhere for one in group}
    for one in group:
        if found[one.name].reason is not None:
            continue
        before = standing(device)
        run = _built(one, found[one.name])
        if run is not None:
            runs[one.name], held[one.name] = run, _difference(standing(device), before)
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() - began > ENOUGH:
            break
        names = list(runs)
        for each in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            taken, rise, parts = timed(runs[each], device)
            seen = found[each]
            seen.seconds[f"{name}.{turn}"] = taken
            seen.parts[f"{name}.{turn}"] = dict(parts)
            if rise is not None and not elsewhere[each]:
                seen.peak_bytes = max(seen.peak_bytes or 0, held[each] + rise)


def _built(one: Contender, found: Measured) -> Run | None:
    """The contender's work, warmed up; None and a reason where it cannot be."""
    try:
        run = one.make()
        with Operations(enabled=one.counted) as operations:
            run()
    except ImportError as error:
        found.reason = f"skipped: {error}"
    except Exception as error:
        found.reason = (
            f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
        )
        if one.ours:
            traceback.print_exc()
    else:
        found.operations = operations.total() if one.counted else None
        return run
    return None


def timed(run: Run, device: str) -> tuple[float, int | None, Mapping[str, float]]:
    """Seconds of one run, how far memory rose meanwhile (None where that cannot be told), and seconds of its parts."""
    free(device)
    before = standing(device)
    reset_peak(device)
    wait(device)
    begun = time.perf_counter()
    parts = run()
    wait(device)
    taken = time.perf_counter() - begun
    peak = highest(device)
    return taken, None if peak is None or before is None else max(0, peak - before), parts or {}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Gives back what is not used any more: what the heap still holds would hide what the work needs."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def standing(device: str) -> int | None:
    """Bytes held now: by torch on a card, else by the process (Linux)."""
    free(device)
    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def highest(device: str) -> int | None:
    """The most bytes since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # VmHWM begins anew


def status(key: str) -> int | None:
    """Bytes of a row of /proc/self/status; None where there is none."""
    file = Path("/proc/self/status")
    rows = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return next((1024 * int(row.split()[1]) for row in rows if row.startswith(f"{key}:")), None)


def _difference(after: int | None, before: int | None) -> int:
    return 0 if after is None or before is None else max(0, after - before)


def clocked(device: str, work: Callable[[], Any]) -> float:
    """Seconds of a part inside a run."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def median_seconds(work: Callable[[], object], device: str, times: int = 7, warm: int = 2) -> float:
    """Of `times` runs after `warm` that do not count."""
    return statistics.median(list(_clocked(work, device, times + warm))[warm:])


def _clocked(work: Callable[[], object], device: str, times: int) -> Iterator[float]:
    for _ in range(times):
        yield clocked(device, work)
