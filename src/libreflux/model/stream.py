"""A safetensors file of tensors that are made one by one: `save_file` wants all of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libreflux.files import replace_whole

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""What safetensors calls torch's dtypes."""


def stream_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replaces ``path`` by a safetensors file of tensors that are made one by one; one is in memory at a time.

    Args:
        layout: name -> dtype and shape, in the order of the file.
        tensors: (name, tensor) pairs in that order.
        metadata: strings.

    Raises:
        ValueError: the tensors are not those of the layout.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[str(dtype).removeprefix("torch.")],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)  # aligned, as the format asks

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for (name, (dtype, shape)), (given, tensor) in zip(layout.items(), tensors, strict=True):
                if (given, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                    raise ValueError(f"{given} {tensor.dtype} {tuple(tensor.shape)} in the place of {name}")
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                flat.view(torch.uint8).numpy().tofile(file)

    replace_whole(path, fill)
