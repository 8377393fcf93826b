"""What the text encoders compute in: as a cache was begun, as a recipe says, or as suits the device.

The settings of a cache name it where it is not fp32, in which every cache was made before there was a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from libreflux.data.index import TEXT_PRECISION, connect, read_settings, text_precision_of
from libreflux.data.shards import AFRESH, INDEX
from libreflux.errors import DataError

TextPrecision = Literal["auto", "fp32", "bf16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def resolve(wanted: TextPrecision, device: str, folders: list[Path]) -> str:
    """The name of the dtype, "float32" or "bfloat16".

    Args:
        wanted: what the recipe says. "auto": as the cache was begun, else fp32 on a CPU and bf16 on all else.
        device: where the encoders run.
        folders: those of the cache that hold an index.
    """
    if wanted != "auto":
        return _NAMES[wanted]
    for folder in folders:
        with connect(folder) as index:
            if settings := read_settings(index, folder):
                if (known := text_precision_of(settings)) not in DTYPES:
                    raise DataError(f"damaged index: text_precision {known!r}", where=folder / INDEX, hint=AFRESH)
                return known
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def as_settings(name: str) -> dict[str, str]:
    """What the settings of a cache say of it: nothing of fp32, so that older caches and their runs stay valid."""
    return {} if name == "float32" else {TEXT_PRECISION: name}


def dtype_of(settings: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the text of a cache with these settings was encoded."""
    return DTYPES[text_precision_of(settings)]


def by_block(dtype: torch.dtype, device: str) -> bool:
    """Whether the encoders rest on the CPU: T5-XXL in fp32, 19 GB, leaves a card no room for anything else."""
    return dtype == torch.float32 and torch.device(device).type != "cpu"
