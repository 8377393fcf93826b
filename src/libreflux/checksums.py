"""CRC-32 of tensors, of rows and of parts of files: what tells a bit that flipped on a disk.

CRC-32 finds every single flipped bit and every burst of up to 32 (Peterson and Brown 1961). It guards against chance,
not against people: who may write the data may write the sums.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**22
"""Bytes of a file that have one sum, 4 MiB: 12 GB have 3,000."""
_AT_ONCE = 2**20  # what a thread holds
THREADS = min(8, os.cpu_count() or 1)
"""Threads that sum: zlib leaves the interpreter's lock alone meanwhile."""


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """CRC-32 over tensors on the CPU, in this order: names, dtypes and shapes included."""
    found = 0
    for name, tensor in tensors:
        found = zlib.crc32(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode(), found)
        found = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def of_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row of integers: [N, columns] to [N] int64."""
    raw = np.ascontiguousarray(rows, dtype="<i8").tobytes()
    width = 8 * rows.shape[1]
    sums = (zlib.crc32(raw[start : start + width]) for start in range(0, len(raw), width))
    return np.fromiter(sums, np.int64, len(rows))


def of_json(value: Any) -> int:
    """CRC-32 of what is JSON, however it is written down."""
    return zlib.crc32(json.dumps(value, sort_keys=True, ensure_ascii=True).encode())


def of_file(path: Path, start: int, chunks: int) -> list[int]:
    """CRC-32 of each `CHUNK` bytes of a file: at most `chunks` of them from the byte `start` on."""
    sums, buffer = [], memoryview(bytearray(_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for _ in range(chunks):
            found = left = 0
            for _ in range(CHUNK // _AT_ONCE):
                left = _fill(file, buffer)
                found = zlib.crc32(buffer[:left], found)
            if file.tell() > start:
                sums.append(found)
            start += CHUNK
            if left < _AT_ONCE:
                break
    return sums


def _fill(file: Any, buffer: memoryview) -> int:
    """Bytes read: fewer than fit only at the end of the file."""
    filled = 0
    while filled < len(buffer) and (got := file.readinto(buffer[filled:])):
        filled += got
    return filled
