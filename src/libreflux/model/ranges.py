"""A safetensors file read by ranges: its header once, then each tensor alone, however large the file is.

safetensors' own reader maps the whole file anew each time that it is opened, privately, which Linux refuses for a file
larger than memory and swap.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from libreflux import plainjson

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What safetensors calls the dtypes that are read here; a header may name others."""
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Range:
    """Where a tensor is in a file.

    Attributes:
        kind: its dtype as safetensors calls it, "BF16".
        shape: its sizes.
        start, end: its bytes, from the start of the file.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """torch's dtype; None for one that is not read here."""
        return _DTYPES.get(self.kind)


class RangedFile:
    """The header of a safetensors file, and its tensors one by one.

    Args:
        path: the file.

    Attributes:
        metadata: strings.
        ranges: tensor name -> where it is.

    Raises:
        OSError: the file cannot be opened.
        SafetensorError: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise SafetensorError("its header is cut short")
            raw = file.read(length)
        try:
            header = plainjson.parse(raw.decode())
            told = header.pop("__metadata__", None) or {}
            self.metadata: dict[str, str] = {str(key): str(value) for key, value in told.items()}
            self.ranges = {str(name): _range(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SafetensorError(f"its header is damaged ({type(error).__name__})") from None
        _check_whole(self.ranges, 8 + length, size)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from the file alone, copied when written to; read where it cannot be mapped.

        Raises:
            OSError: the file cannot be read.
            SafetensorError: it became shorter, or the dtype is not read here.
        """
        where = self.ranges[name]
        dtype = where.dtype
        if dtype is None:
            raise SafetensorError(f"{name} is stored as {where.kind}")
        if where.start == where.end:
            return torch.empty(where.shape, dtype=dtype)
        with open(self.path, "rb") as file:
            if file.seek(0, 2) < where.end:
                raise SafetensorError("it became shorter while it was read")
            flat = _mapped(file, where, dtype)
            if flat is None:
                buffer = bytearray(where.end - where.start)
                file.seek(where.start)
                if file.readinto(buffer) != len(buffer):
                    raise SafetensorError("it became shorter while it was read")
                flat = torch.frombuffer(buffer, dtype=dtype)
        return flat.reshape(where.shape)


def _mapped(file: Any, where: Range, dtype: torch.dtype) -> Tensor | None:
    """The range alone, as memory of the file; None where the system or the place of its first byte refuses."""
    first = where.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    if (where.start - first) % dtype.itemsize:
        return None
    try:
        held = mmap.mmap(file.fileno(), where.end - first, access=mmap.ACCESS_COPY, offset=first)
    except (OSError, ValueError):  # some network file systems
        return None
    count = (where.end - where.start) // dtype.itemsize
    return torch.frombuffer(held, dtype=dtype, count=count, offset=where.start - first)  # keeps `held`, and frees it


def _range(entry: dict[str, Any], data: int) -> Range:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(one) is int and one >= 0 for one in (start, end, *shape)):
        raise ValueError
    found = Range(str(entry["dtype"]), shape, data + start, data + end)
    if found.dtype is not None and end - start != math.prod(shape) * found.dtype.itemsize:
        raise ValueError
    return found


def _check_whole(ranges: dict[str, Range], data: int, size: int) -> None:
    """Raises SafetensorError unless the tensors lie one behind another, from the header to the file's end."""
    at = data
    for where in sorted(ranges.values(), key=lambda where: (where.start, where.end)):
        if where.start != at or where.end < at:
            raise SafetensorError("its tensors overlap or have gaps")
        at = where.end
    if at != size:
        raise SafetensorError(f"it has {size} bytes instead of {at}")
