"""Out of memory: one line with what helps, instead of a traceback that ends in an allocator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from libreflux.errors import RunError
from libreflux.recipe import Recipe

_SAID = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says in a plain RuntimeError: its CPU allocator on Linux and Windows, MPS, CUDA's libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


PREPARING = "a smaller resolution, device: cpu, or `libreflux prepare` on a machine with more memory"
MEASURING = "held_out.every: 0, or, with --fork, a smaller batch (they are measured in batches) or resolution"
DRAWING = "samples.every: 0 and at_start: false, or a smaller resolution"


@contextmanager
def explained(doing: str, recipe: Recipe, mend: str | None = None) -> Iterator[None]:
    """Turns running out of memory in the block into a line that names what helps, in the order to try it.

    Args:
        doing: what the block does, e.g. "step 3".
        recipe: as resolved.
        mend: what helps; None: the recipe's keys that make training smaller.

    Raises:
        RunError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sides = ", ".join(map(str, recipe.resolution))
        where = f"{doing}, batch {recipe.batch}, resolution {sides}, device {recipe.device}"
        raise RunError("out of memory", where=where, mend=mend or _smaller(recipe)) from error


def _smaller(recipe: Recipe) -> str:
    ways = []
    if not recipe.gradient_checkpointing:
        ways.append("gradient_checkpointing: true")
    if recipe.base != "int8":
        ways.append("base: int8")
    if recipe.batch > 1 and recipe.batch % 2 == 0:
        ways.append(f"batch: {recipe.batch // 2} with accumulate: {recipe.accumulate * 2}")
    elif recipe.batch > 1:
        ways.append(f"batch: 1 with accumulate: {recipe.accumulate * recipe.batch}")
    ways.append(f"resolution below {max(recipe.resolution)}")
    others = ["optimizer.kind: adamw_bf16"] if recipe.optimizer.kind == "adamw" else []
    anew = " or ".join([*others, "fewer adapted layers"])
    ways.append(f"in another `out`, {anew}")
    tried = "; ".join(ways)
    return (
        f"try, in this order, {tried}; `train --dry-run` estimates, --fork goes on from a checkpoint in the same `out`"
    )
