"""Several processes, one run: who am I, one sum of the flat gradient, one word on stopping.

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. Adapters are small, so there is no wrapper around the
model: after accumulation one all-reduce adds the flat fp32 gradients, each already weighted by its samples. Every rank
then takes the same optimizer step from the same numbers, so replicas stay byte-equal.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from libreflux.errors import RunError

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others, e.g. while the first one prepares, saves, draws or measures."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`.

    Attributes:
        rank: from 0; the first one alone writes files.
        world: how many there are; 1 without torchrun.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, flat: Tensor) -> None:
        """Adds the ranks' tensors in place, on all of them; the same bytes everywhere."""
        if self.world > 1:
            dist.all_reduce(flat)

    def agree_max(self, value: int) -> int:
        """The largest of the ranks' numbers, on all of them."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: Any) -> Sequence[Any]:
        """Every rank's value, in rank order, on all of them, as JSON has it: tuples as lists, floats to the bit."""
        text = json.dumps(value)
        if self.world == 1:
            return [json.loads(text)]
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def in_turn(self, first: Callable[[], T], rest: Callable[[], T]) -> T:
        """The first rank calls `first` while the others wait; then they call `rest`.

        Raises:
            RunError: on the others, when the first one failed; it raises its own error.
        """
        if not self.first:
            failed = self.gather(None)[0]
            if failed is not None:
                raise RunError(f"the first process failed ({failed})", where=f"process {self.rank}")
            return rest()
        try:
            result = first()
        except BaseException as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        self.gather(None)
        return result


@contextmanager
def joined(device: str, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The process group of torchrun's environment while the block runs; alone without it.

    Args:
        device: "cuda…" joins through NCCL, all else through gloo.
        timeout: seconds after which waiting for a lost rank ends in an error.

    Raises:
        RunError: torchrun's environment is not whole.
    """
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise RunError(
            "RANK and WORLD_SIZE are not numbers", where="environment", mend="start it by torchrun"
        ) from None
    if world == 1:
        yield Ranks()
        return
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise RunError("WORLD_SIZE without RANK or MASTER_ADDR", where="environment", mend="start it by torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield Ranks(rank, world)
    finally:
        dist.destroy_process_group()
