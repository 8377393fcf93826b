"""What a training run says when memory runs out or a card fails: one line with the keys that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from libreflux.errors import OptionHint
from libreflux.model import device_faults
from libreflux.recipe import Recipe

ESTIMATES = "a dry run estimates every phase"


@contextmanager
def explained(doing: str, recipe: Recipe, hint: str | None = None) -> Iterator[None]:
    """Turns what the device raises in the block into a line that names what helps, in the order to try it.

    Args:
        doing: what the block does, e.g. "step 3".
        recipe: as resolved.
        hint: what helps; None: the recipe's keys that make training smaller.

    Raises:
        RunError: the block ran out of memory.
        DeviceError: the card failed; the same command goes on from the last checkpoint.
    """
    sides = ", ".join(map(str, recipe.resolution))
    where = f"{doing}, batch {recipe.batch}, resolution {sides}, device {recipe.device}"
    again = "run the same command again: it goes on from the last checkpoint"
    with device_faults.explained(where, hint or training(recipe), again):
        yield


def training(recipe: Recipe) -> str:
    """What makes a step smaller, by the keys that are not set so already."""
    ways = _in_order(smaller_steps(recipe))
    return OptionHint(f"{ways}; {ESTIMATES}, `fork` goes on from a checkpoint in the same `out`")


def smaller_steps(recipe: Recipe) -> list[str]:
    """The ways of `training`, in the order to try them."""
    ways = []
    if recipe.text_cache == "none":
        ways.append("text_cache: int8 (no encoder stays in memory)")
    if recipe.gradient_checkpointing is not True:
        ways.append("gradient_checkpointing: true")
    if recipe.base in ("bf16", "fp32"):
        ways.append("base: int8")
    if not on_cpu(recipe):
        ways.append("a larger number for offload_blocks" if recipe.offload_blocks else "offload_blocks: auto (slower)")
    if recipe.batch > 1 and recipe.batch % 2 == 0:
        ways.append(f"batch: {recipe.batch // 2} with accumulate: {recipe.accumulate * 2}")
    elif recipe.batch > 1:
        ways.append(f"batch: 1 with accumulate: {recipe.accumulate * recipe.batch}")
    ways.append(f"resolution below {max(recipe.resolution)}")
    others = ["optimizer.kind: adamw_bf16"] if recipe.optimizer.kind == "adamw" else []
    anew = " or ".join([*others, "fewer adapted layers (adapter.targets)"])
    return [*ways, f"in another `out`, {anew}"]


def preparing(recipe: Recipe) -> str:
    """What makes encoding smaller: T5 is by far the largest part, and crops are encoded one by one."""
    ways = []
    if on_cpu(recipe) and recipe.text_precision != "bf16":
        ways.append("text_precision: bf16")
    elif not on_cpu(recipe):
        if recipe.text_precision != "fp32":
            ways.append("text_precision: fp32 (T5 goes through the card block by block then)")
        ways.append("device: cpu")
    ways.append(f"resolution below {max(recipe.resolution)}")
    anew = "where a cache is begun already, another precision needs another `cache`"
    return f"{_in_order(ways)}; or `libreflux prepare` on a machine with more memory; {anew}; {ESTIMATES}"


def measuring(recipe: Recipe) -> str:
    """What makes measuring held-out pictures smaller: a batch of them goes through the model at a time."""
    ways = ["held_out.every: 0"]
    if recipe.batch > 1:
        ways.append(f"with `fork`, batch: 1 with accumulate: {recipe.accumulate * recipe.batch}")
    ways.append("with `fork`, a smaller first value of resolution")
    return OptionHint(f"{_in_order(ways)}; {ESTIMATES}")


def drawing(recipe: Recipe) -> str:
    """What makes drawing smaller: a picture has the side of the largest resolution."""
    off = "samples.every: 0" + (" with samples.at_start: false" if recipe.samples.at_start else "")
    ways = [off, f"with `fork`, resolution below {max(recipe.resolution)}"]
    return OptionHint(f"{_in_order(ways)}; {ESTIMATES}")


def on_cpu(recipe: Recipe) -> bool:
    """Whether a recipe would train on the CPU here."""
    return recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available())


def _in_order(ways: list[str]) -> str:
    return f"try, in this order, {'; '.join(ways)}"
