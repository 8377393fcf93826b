"""CRC-32 of rows and of parts of files: what tells a bit that flipped on a disk.

CRC-32 finds every single flipped bit and every burst of up to 32 (Peterson and Brown 1961). It guards against chance,
not against people: who may write the data may write the sums.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

AT_ONCE = 2**20  # the most that a thread holds
THREADS = min(8, os.cpu_count() or 1)
"""Threads that sum: zlib leaves the interpreter's lock alone meanwhile."""


def of_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row of integers: [N, columns] to [N] int64."""
    raw = np.ascontiguousarray(rows, dtype="<i8").tobytes()
    width = 8 * rows.shape[1]
    sums = (zlib.crc32(raw[start : start + width]) for start in range(0, len(raw), width))
    return np.fromiter(sums, np.int64, len(rows))


def of_json(value: Any) -> int:
    """CRC-32 of what is JSON, however it is written down."""
    return zlib.crc32(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())


def of_values(*values: int | str | bytes | None) -> int:
    """CRC-32 of a row of a table."""
    return zlib.crc32(repr(values).encode())


def of_file(path: Path, chunk: int, first: int = 0, count: int | None = None) -> list[int]:
    """CRC-32 of each `chunk` bytes of a file: `count` of them from number `first` on, or all; the last may be shorter.

    Raises:
        OSError: it cannot be read.
    """
    sums: list[int] = []
    buffer = memoryview(bytearray(min(chunk, AT_ONCE)))
    with open(path, "rb", buffering=0) as file:
        file.seek(first * chunk)
        while count is None or len(sums) < count:
            found = got = 0
            while got < chunk and (read := file.readinto(buffer[: chunk - got])):
                found, got = zlib.crc32(buffer[:read], found), got + read
            if got:
                sums.append(found)
            if got < chunk:
                break
    return sums
