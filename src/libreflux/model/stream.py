"""A safetensors file written tensor by tensor: `save_file` wants all of them on the host at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from libreflux.files import replace_whole

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors calls torch's dtypes."""
_ORDER = ("bool", "uint8", "int8", "float16", "bfloat16", "int32", "float32", "float64", "int64")
"""As safetensors sorts them: a file begins with the last one's tensors."""


def save_live(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Replaces ``path`` by a safetensors file of tensors that are in use, on any device; one is copied at a time.

    Names, order, values and so the bytes are those of ``files.atomic_save_safetensors``.

    Args:
        tensors: name -> tensor; views of one storage are each written whole. They must not change meanwhile.
        metadata: strings.
    """
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-_ORDER.index(kinds[name]), name))
    layout = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    stream_safetensors(path, layout, ((name, tensors[name]) for name in names), metadata)


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
                file.write(flat.view(torch.uint8).numpy().data)  # `tofile` would not say why it failed: a full disk
                del flat  # before the next one is made

    replace_whole(path, fill)
