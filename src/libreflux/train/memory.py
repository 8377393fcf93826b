"""What a training run says when memory runs out or a card fails: one line with the keys that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from libreflux.model import faults
from libreflux.recipe import Recipe

PREPARING = "a smaller resolution, device: cpu, or `libreflux prepare` on a machine with more memory"
MEASURING = "held_out.every: 0, or, with --fork, a smaller batch (they are measured in batches) or resolution"
DRAWING = "samples.every: 0 and at_start: false, or a smaller resolution"


@contextmanager
def explained(doing: str, recipe: Recipe, mend: str | None = None) -> Iterator[None]:
    """Turns what the device raises in the block into a line that names what helps, in the order to try it.

    Args:
        doing: what the block does, e.g. "step 3".
        recipe: as resolved.
        mend: what helps; None: the recipe's keys that make training smaller.

    Raises:
        RunError: the block ran out of memory.
        DeviceError: the card failed; the same command goes on from the last checkpoint.
    """
    sides = ", ".join(map(str, recipe.resolution))
    where = f"{doing}, batch {recipe.batch}, resolution {sides}, device {recipe.device}"
    again = "run the same command again: it goes on from the last checkpoint"
    with faults.explained(where, mend or _smaller(recipe), again):
        yield


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
