"""Where tensors live: `auto` is the best device that this machine has."""

from __future__ import annotations

import functools
import gc
import os
import re
import shutil
from pathlib import Path

import torch

from libreflux.errors import RecipeError, RunError
from libreflux.printing import counted, get_logger

logger = get_logger(__name__)

_DTYPES = {
    **{
        str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    },
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
}
_HIDDEN = ("", "-1")  # values of *_VISIBLE_DEVICES with which a user asks for the CPU


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: "auto" or what torch calls one, e.g. "cuda:1" or "mps".

    "auto" is CUDA, else the CPU; a GPU that torch cannot use is named in a warning, once. Under torchrun "auto" and
    "cuda" are each process's own card.

    Raises:
        RunError: no such device on this machine, fewer cards than processes, or one card for several of them.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_card("cuda")
        warn_of_idle_gpu()
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"{name!r} is no device", where="device", hint="use auto, cpu, cuda, cuda:N or mps") from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= count:
        idle = _wanted_idle_gpu() if device.type == "cuda" and not count else None
        what = f"this machine has no {name}" if idle is None else f"torch cannot use {idle[0]}"
        raise RunError(what, where="device", hint="use auto or cpu" if idle is None else idle[1])
    return _own_card(name) if device.type == "cuda" else device


def _own_card(name: str) -> torch.device:
    """This process's card: of "cuda" under torchrun the one of its number on this machine."""
    device, own = torch.device(name), os.environ.get("LOCAL_RANK")
    if not own:
        return device
    try:
        rank, processes = int(own), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        what = "LOCAL_RANK and LOCAL_WORLD_SIZE are not numbers"
        raise RunError(what, where="environment", hint="start it by torchrun") from None
    processes, cards = max(processes, rank + 1), torch.cuda.device_count()
    if device.index is not None and processes > 1:
        raise RunError(f"{name} for {processes} processes on this machine", where="device", hint="set device: cuda")
    if processes > cards:
        what = f"{counted(processes, 'process', 'processes')}, but {counted(cards, 'card')} on this machine"
        hint = f"start them with --nproc_per_node={cards}"
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            hint += ", or let every process see all cards: unset CUDA_VISIBLE_DEVICES"
        raise RunError(what, where="device", hint=hint)
    return device if device.index is not None else torch.device("cuda", rank)


def make_current(device: torch.device | str) -> None:
    """Makes a CUDA device with a number the one that torch means by "cuda"; any other device is left alone."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def with_fp64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device that knows fp64: its own, or for MPS, which has none, the CPU. Its dtype stays."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def pick_dtype(name: torch.dtype | str | None, where: str = "dtype") -> torch.dtype | None:
    """The dtype of weights that a caller names: as torch has it, "bfloat16" or "bf16"; None stays None.

    Raises:
        RecipeError: no such dtype, or none that weights are computed with.
    """
    found = _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if name is None or (isinstance(found, torch.dtype) and found in _DTYPES.values()):
        return found
    raise RecipeError(f"cannot be {name!r}", where=where, hint=f"use one of {', '.join(_DTYPES)}, or None for stored")


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether a card, or a CPU with instructions for bf16, does the work; else torch widens it, and fp32 is faster."""
    if torch.device(device).type != "cpu":
        return True
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # of ARM; not in older torch
    return bool(told.get("bf16")) or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def release(device: torch.device | str) -> None:
    """Gives back what nothing refers to any more, of this process and of what torch's allocator keeps of a card."""
    gc.collect()  # models are full of cycles
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()


def idle_gpu(
    root: Path = Path("/"), path: str | None = None, built_for: tuple[str | None, str | None] | None = None
) -> tuple[str, str] | None:
    """A GPU of this machine that torch, which has none, could use, and the hint; None where nothing is known of one.

    Args:
        root: where `proc`, `dev`, `sys` and `usr` are.
        path: where `nvidia-smi` is looked for; None is PATH.
        built_for: the versions of CUDA and of ROCm that torch was built for; None asks torch.
    """
    cuda, rocm = (torch.version.cuda, torch.version.hip) if built_for is None else built_for
    driver = root / "proc/driver/nvidia/version"
    if driver.is_file() or any((root / sign).exists() for sign in ("dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1")):
        return _idle_nvidia(root, driver, cuda)
    if shutil.which("nvidia-smi", path=path):  # Windows
        return _idle_nvidia(root, driver, cuda)
    if (root / "dev/kfd").exists():
        if rocm is None:
            return "an AMD GPU: it is built without ROCm", "install torch for ROCm, see pytorch.org/get-started/locally"
        return "an AMD GPU", "look whether you may write to /dev/kfd (group render), and what rocminfo says"
    return None


def _idle_nvidia(root: Path, driver: Path, cuda: str | None) -> tuple[str, str]:
    if cuda is None:
        return "an NVIDIA GPU: it is built without CUDA", (
            "install torch for CUDA, see pytorch.org/get-started/locally"
        )
    if driver.is_file() and not list(root.glob("dev/nvidia[0-9]*")):
        return "an NVIDIA GPU: it has no /dev/nvidia*", "start the container with the GPU, e.g. docker run --gpus all"
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", _text(driver))
    return f"an NVIDIA GPU: CUDA {cuda} does not start with its driver{f' {found[1]}' if found else ''}", (
        "update the driver, or install torch for an older CUDA; nvidia-smi names the newest that the driver knows"
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _wanted_idle_gpu() -> tuple[str, str] | None:
    """None where the user has hidden the GPUs."""
    told = [os.environ.get(f"{kind}_VISIBLE_DEVICES") for kind in ("CUDA", "HIP", "ROCR")]
    return None if any(value in _HIDDEN for value in told) else idle_gpu()


@functools.cache
def warn_of_idle_gpu() -> None:
    """Once a process: of a GPU here that torch cannot use."""
    if idle := _wanted_idle_gpu():
        logger.warning("torch cannot use %s, so the CPU computes; hint: %s", *idle)
