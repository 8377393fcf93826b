"""Several processes, one run: who am I, one sum of the flat gradient, one word on stopping.

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK. Adapters are small, so there is no wrapper around the
model: after accumulation one all-reduce adds the flat fp32 gradients, each already weighted by its samples. Every rank
then takes the same optimizer step from the same numbers, so replicas stay byte-equal. What ranks say to each other in
words goes through a gloo group of its own, in which a rank may be late by hours.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from libreflux.data.order import Unit
from libreflux.errors import RunError
from libreflux.processes import own_rank

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a rank waits in the sum of the gradient, which all ranks begin together, see `Ranks.gather`."""
PATIENCE = 365 * 86400.0
"""Seconds that a rank waits for another one's word: it may be preparing, saving, drawing or measuring. No wait ends in
an error by this; a process that died is noticed at once, by its closed connection."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`.

    Attributes:
        rank: from 0; the first one alone writes files.
        world: how many there are; 1 without torchrun.
        words: the group in which they talk, as patient as `PATIENCE`; None is the default group.

    Every method but `sum_` waits for the slowest rank, however long that takes. All of them raise RunError where
    another process was lost.
    """

    rank: int = 0
    world: int = 1
    words: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, flat: Tensor) -> None:
        """Adds the ranks' tensors in place, on all of them; the same bytes everywhere.

        Raises:
            RunError: also after `TIMEOUT`: let the ranks meet first, by `gather`.
        """
        if self.world > 1:
            with self._heard("the sum of the gradient"):
                dist.all_reduce(flat)

    def agree_max(self, value: int) -> int:
        """The largest of the ranks' numbers, on all of them."""
        if self.world == 1:
            return value
        shared = torch.tensor(value)
        with self._heard():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.words)
        return int(shared)

    def gather(self, value: Any) -> Sequence[Any]:
        """Every rank's value, in rank order, on all of them, as JSON has it: tuples as lists, floats to the bit."""
        text = json.dumps(value)
        if self.world == 1:
            return [json.loads(text)]
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with self._heard():
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.words)
            longest = max(int(size) for size in sizes)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=self.words)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def meet(self) -> None:
        """Waits until all ranks have come here."""
        self.gather(None)

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
            with contextlib.suppress(RunError):  # its own error says more than that others are gone too
                self.gather(f"{type(error).__name__}: {error}")
            raise
        self.gather(None)
        return result

    def _heard(self, what: str = "word from the others") -> contextlib.AbstractContextManager[None]:
        return _explained(f"process {self.rank} of {self.world}", f"waiting for {what}")


@contextmanager
def _explained(where: str, doing: str) -> Iterator[None]:
    """Turns what torch.distributed raises in the block into one line; a card's own errors are left to others."""
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        hint = "look at the log of the process that died; the same torchrun command goes on from the last checkpoint"
        if "NCCL" in lines[0]:  # which tells its cause after these words, and often is the first to be alive still
            told = lines[next((n + 1 for n, line in enumerate(lines) if line.startswith("Last error")), 0) % len(lines)]
            raise RunError(f"NCCL failed while {doing} ({told})", where=where, hint=hint) from error
        said = lines[0]
        said = re.sub(r"^\[[^]]*\] ", "", said).partition(". ")[0]  # without gloo's place in its source and its advice
        raise RunError(f"another process was lost while {doing} ({said})", where=where, hint=hint) from error


@contextmanager
def joined(device: str, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The process group of torchrun's environment while the block runs; alone without it.

    Args:
        device: "cuda:N" joins through NCCL, all else through gloo. What ranks say to each other goes through gloo.
        timeout: seconds after which a start or a sum without all ranks ends in an error.

    Raises:
        RunError: torchrun's environment is not whole, or another process did not come.
    """
    rank, world = own_rank()
    if world == 1:
        yield Ranks()
        return
    if "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
        raise RunError("WORLD_SIZE without RANK or MASTER_ADDR", where="environment", hint="start it by torchrun")
    card = torch.device(device) if device.startswith("cuda") else None
    if card is not None and card.index is None:
        raise RunError("WORLD_SIZE without LOCAL_RANK", where="environment", hint="start it by torchrun")
    try:
        with _explained(f"process {rank} of {world}", "all of them were to start"):
            # The sum is waited for where it is asked for: a lost process is then an error there, not an abort later.
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            dist.init_process_group(
                "gloo" if card is None else "nccl", timeout=datetime.timedelta(seconds=timeout), device_id=card
            )
            words = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=PATIENCE))
        yield Ranks(rank, world, words)
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # after a card's failure: that is what is to be told
                dist.destroy_process_group()


def sigma_means(units: Sequence[Unit], sigmas: Tensor, world: int) -> list[float | None]:
    """Mean noise level of each rank's pictures in one step; None for a rank that has none.

    Args:
        units: the step's, of all ranks.
        sigmas: [count] fp32, by slot.
        world: number of ranks.
    """
    by_rank: list[list[int]] = [[] for _ in range(world)]
    for unit in units:
        by_rank[unit.rank] += unit.slots
    return [float(sigmas[slots].double().mean()) if slots else None for slots in by_rank]
