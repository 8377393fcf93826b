"""Where pictures are drawn, and which ways to save memory go with it."""

from __future__ import annotations

import torch

from libreflux.errors import OptionError
from libreflux.model.compile_choice import Compile
from libreflux.model.compiling import missing_compiler
from libreflux.model.device import make_current, pick_device
from libreflux.model.offload import check_device
from libreflux.workflows.picture_options import Offload, OffloadBlocks, Quantize

WAITING: tuple[Offload, ...] = ("model", "sequential")
"""Under these every part rests on the CPU and comes to the device in its turn."""


def device_for(
    name: str,
    offload: Offload,
    quantize: Quantize | None = None,
    offload_blocks: OffloadBlocks = 0,
    compile: Compile = "auto",
) -> torch.device:
    """The device of a name, see `pick_device`, made the current one.

    Raises:
        OptionError: an offload that it, or an int8 model, has no use for; or compiling, where that cannot be done.
        RunError: no such device.
    """
    place = pick_device(name)
    if quantize is not None:
        refuse_int8(offload)
    if offload in WAITING and place.type != "cuda":
        what = f"{offload} is of no use on {place.type}"
        raise OptionError(what, "offload", hint="leave it out, or use a CUDA device")
    if offload_blocks not in ("auto", 0):
        check_device(place)
    if compile == "on":
        refuse_compiling(place, offload)
    make_current(place)
    return place


def refuse_compiling(place: torch.device, offload: Offload) -> None:
    """Raises OptionError where blocks cannot be compiled."""
    if offload == "sequential":  # accelerate's hooks run within each block
        what = "does not go with `offload` sequential"
        raise OptionError(what, "compile", value="on", hint="use `offload` model")
    if (missing := missing_compiler(place)) is not None:
        raise OptionError(missing, "compile", value="on", hint="set `compile` off")


def refuse_int8(offload: Offload) -> None:
    """Raises OptionError for an offload that int8 weights have no use for."""
    if offload == "sequential":  # accelerate's hooks move parameters, and int8 weights are buffers
        what = "does nothing for int8 weights, which all stay on the device"
        raise OptionError(what, "offload", value="sequential", hint="use `offload_blocks` auto or `offload` model")
