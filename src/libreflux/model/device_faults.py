"""What goes wrong on a device, on one line: memory that ran out, a CUDA error; instead of a traceback of 60 lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from libreflux.errors import DeviceError, LibrefluxError, RunError

_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no plan's workspace could be had
    "Unable to find a valid cuDNN algorithm",
)
"""What torch says in a plain RuntimeError: its CPU allocator on Linux and Windows, MPS, CUDA's libraries."""
_BROKEN = (
    "CUDA error",
    "CUDA driver error",
    "CUDA driver initialization failed",
    "CUDA unknown error",
    "NVIDIA driver",
    "No CUDA GPUs",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "cuDNN error",
    "NCCL error",
    "HIP error",
)
"""What torch says of a card that failed, in a RuntimeError of its own kind or a plain one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)


def is_device_error(error: BaseException) -> bool:
    """Whether an exception comes from a card, its driver or its libraries, and not from a lack of memory."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(said in str(error) for said in _BROKEN)


def told(error: BaseException, doing: str, hint: str, again: str = "run the command again") -> LibrefluxError | None:
    """The one line for an exception of a device; None for any other.

    Args:
        error: what was raised.
        doing: what was being done, with its sizes.
        hint: what makes it smaller, for memory that ran out.
        again: how to go on after a card failed.
    """
    if is_out_of_memory(error):
        return RunError("out of memory", where=doing, hint=hint)
    if is_device_error(error):
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = f"{again}; CUDA_LAUNCH_BLOCKING=1 names the operation, LIBREFLUX_TRACEBACK=1 shows where"
        return DeviceError(f"the device failed ({said})", where=doing, hint=hint)
    return None


@contextmanager
def explained(doing: str, hint: str, again: str = "run the command again") -> Iterator[None]:
    """Turns what a device raises in the block into one line; the innermost such block has the word.

    Args:
        doing, hint, again: see `told`.

    Raises:
        RunError: the block ran out of memory.
        DeviceError: the card failed; nothing more can be computed on it in this process.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        line = told(error, doing, hint, again)
        if line is None:
            raise
        raise line from error
