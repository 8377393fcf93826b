"""Copies from a card to the host beside its work: on a stream of their own, and used by a thread of their own.

A step's weights are copied while the next step computes its gradient: only the next change of them waits for the copy,
on the card's own clock. What the numbers are used for on the host is done by one worker thread meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from libreflux.printing import get_logger

log = get_logger(__name__)

ALIGNED = 16
"""Bytes; where a tensor may begin in the host's buffer."""


class Lane(Protocol):
    """A stream of copies beside a device's own work."""

    pinned: bool
    """Whether the host's buffer must stay in place for the copies to run by themselves."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Begins (target, source) copies, after what the device has been given so far."""

    def hold(self) -> None:
        """Lets what the device is given from now on wait for the copies; the host does not wait."""

    def wait(self) -> None:
        """Returns when the copies are done."""


class CudaLane:
    """A CUDA stream and an event at the end of its copies."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.copied = torch.cuda.Event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self.copied.record(self.stream)

    def hold(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied)

    def wait(self) -> None:
        with torch.cuda.device(self.device):  # a new thread's card is the first one, where it has nothing to do
            self.copied.synchronize()


def lane_for(tensors: Iterable[Tensor]) -> Lane | None:
    """The lane of the one card on which all of some tensors live; None if they do not."""
    devices = {tensor.device for tensor in tensors}
    device = next(iter(devices), None)
    return CudaLane(device) if device is not None and len(devices) == 1 and device.type == "cuda" else None


class Overlapped:
    """Gives a function on the host what some tensors of a card hold at a moment, while the card goes on.

    Args:
        tensors: name -> tensor, whose storage stays where it is.
        lane: of their device.

    One flat buffer on the host holds the last copy, in the tensors' own dtypes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], lane: Lane) -> None:
        self.tensors, self.lane = {name: tensor.detach() for name, tensor in tensors.items()}, lane
        ends, end = {}, 0
        for name, tensor in self.tensors.items():
            ends[name] = (end, end + tensor.nbytes)
            end = -(-ends[name][1] // ALIGNED) * ALIGNED
        buffer = host_buffer(end, lane.pinned)
        self.copies = {
            name: buffer[slice(*ends[name])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in self.tensors.items()
        }
        self._worker = ThreadPoolExecutor(1, "overlapped")
        self._pending: Future[None] | None = None

    def start(self, use: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Copies the tensors as they are now and lets the worker call `use` with the copies, by name.

        Call `before_change` before the tensors change. Waits for the last call's work first, and raises its error.
        """
        self.wait()
        self.lane.copy((self.copies[name], tensor) for name, tensor in self.tensors.items())

        def work() -> None:
            self.lane.wait()
            with torch.no_grad():
                use(self.copies)

        self._pending = self._worker.submit(work)

    def before_change(self) -> None:
        """Lets the device's next work wait for the copies that are under way; the host goes on at once."""
        if self._pending is not None:
            self.lane.hold()

    def wait(self) -> None:
        """Returns when the worker is done; raises what it raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def host_buffer(size: int, pinned: bool) -> Tensor:
    """`size` bytes on the host, pinned where asked for and possible; a warning where it is not."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            log.warning("%.1f GB of memory cannot be pinned (%s): the card waits for its copies", size / 1e9, said)
    return torch.empty(size, dtype=torch.uint8)
