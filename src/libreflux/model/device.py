"""Where tensors live: `auto` is the best device that this machine has."""

from __future__ import annotations

import os

import torch

from libreflux.errors import RunError


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: "auto" or what torch calls one, e.g. "cuda:1" or "mps".

    "auto" is CUDA, under torchrun each process's own card, else the CPU.

    Raises:
        RunError: no such device on this machine.
    """
    if name == "auto":
        own = os.environ.get("LOCAL_RANK")
        return torch.device(f"cuda:{own}" if own else "cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"{name!r} is no device", where="device", mend="use auto, cpu, cuda, cuda:N or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        device.type, 0
    )
    if (device.index or 0) >= count:
        raise RunError(f"this machine has no {name}", where="device", mend="use auto or cpu")
    return device
