"""What a recipe leaves to the estimate: how many blocks of the base wait in RAM, and how many are computed again.

Both are decided at each start for the memory that is free then. On a CPU neither changes a bit of what is trained
(tests/training/test_memory_plan.py, test_offloading.py); on a card that is not verified.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from libreflux.model import offload
from libreflux.model.device import release
from libreflux.model.facts import trained_facts
from libreflux.model.source import ModelSource
from libreflux.printing import counted
from libreflux.recipe import Recipe
from libreflux.training.callbacks import Callbacks
from libreflux.training.estimate import estimate_recipe
from libreflux.training.phases import CARD_RESERVE, Estimate
from libreflux.training.ranks import Ranks

OFFLOAD, CHECKPOINTING = "offload_blocks", "gradient_checkpointing"
CPU_MARGIN = 0.9
"""Share of a machine's free memory that a run is planned for: other programs grow too."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory.

    Attributes:
        waiting: blocks that wait in RAM, see `model.offload`.
        kept: blocks that keep what they compute for backward, and are not computed again; None: all of them.
    """

    waiting: int
    kept: int | None


def check(recipe: Recipe, source: ModelSource, device: torch.device | str) -> None:
    """Raises OptionError for an `offload_blocks` of no use on this device, or more blocks than the model has."""
    if recipe.offload_blocks not in ("auto", 0):
        offload.check_device(device, OFFLOAD)
    check_count(recipe, source)


def check_count(recipe: Recipe, source: ModelSource) -> None:
    """Raises OptionError for more blocks than the model has, or too few to save anything."""
    if recipe.offload_blocks != "auto":
        offload.check_count(recipe.offload_blocks, len(offload.block_names(source.config)), OFFLOAD)


def needed(estimate: Estimate, capacity: float) -> int:
    """The least number of waiting blocks with which all that holds the base fits, the allocator's reserve included.

    Where none is enough, that of all blocks; on a CPU 0. Preparing comes before the base: it does not count.

    Args:
        estimate: of the run.
        capacity: bytes of the card.
    """
    if estimate.on_cpu:
        return 0

    return offload.fewest(len(estimate.blocks), lambda count: holding(estimate.offloaded(count)) <= capacity)


def holding(estimate: Estimate) -> float:
    """Bytes of the largest phase that holds the base, the allocator's reserve of a card included."""
    peak = max(phase.peak for phase in (estimate.training, *estimate.between))
    return peak if estimate.on_cpu else CARD_RESERVE * peak


def affordable(estimate: Estimate, capacity: float) -> int:
    """The largest number of blocks that can keep what they compute for backward, while training fits.

    It is 0 where blocks wait in RAM, and short of all blocks a place is left for one more than there are.

    Args:
        estimate: of the run, with `unchecked` activations.
        capacity: bytes of the device.
    """
    total = len(estimate.blocks)
    reserve = 1 if estimate.on_cpu else CARD_RESERVE
    if estimate.waiting:
        return 0
    fit = [count for count in range(total + 1) if reserve * estimate.keeping(count).training.peak <= capacity]
    most = max(fit, default=0)
    return most if most == total else max(0, most - 1)


def fitted(recipe: Recipe, estimate: Estimate, capacity: float) -> Estimate:
    """The estimate with what is `auto` in the recipe decided for a device.

    Args:
        recipe: as resolved.
        estimate: from `estimate_recipe`.
        capacity: bytes of the device.
    """
    if recipe.offload_blocks == "auto":
        estimate = estimate.offloaded(needed(estimate, capacity))
    if recipe.gradient_checkpointing == "auto":
        estimate = estimate.keeping(affordable(estimate, capacity))
    return estimate


def free_memory(device: torch.device | str) -> int:
    """Bytes of a device that nobody holds: of a card what torch keeps without using it too, of a CPU's a share."""
    if torch.device(device).type != "cuda":
        return int(CPU_MARGIN * psutil.virtual_memory().available)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved - used


def plan_memory(
    recipe: Recipe, source: ModelSource, device: torch.device | str, ranks: Ranks, callbacks: Callbacks
) -> MemoryPlan:
    """What the recipe says, and what `auto` stands for with the memory that is free now: told.

    Args:
        recipe: as resolved.
        source: the model.
        device: what trains.
        ranks: of several processes the one with the least memory decides.
        callbacks: hears of it.
    """
    total = len(offload.block_names(source.config))
    asked = {OFFLOAD: recipe.offload_blocks, CHECKPOINTING: recipe.gradient_checkpointing}
    automatic = {key for key, value in asked.items() if value == "auto"}
    waiting = 0 if OFFLOAD in automatic else int(recipe.offload_blocks)
    kept = None if recipe.gradient_checkpointing is False else 0
    told = f"of no use on {device}"
    if automatic - (set() if torch.device(device).type in offload.DEVICES else {OFFLOAD}):
        with callbacks.stage("estimating the memory of the run"):
            release(torch.device(device))
            tokens = trained_facts(source.facts, text_padding=recipe.text_padding).max_tokens
            free = free_memory(device)
            found = fitted(recipe, estimate_recipe(recipe, source, text_tokens=tokens), free)
        told = f"{free / 2**30:,.1f} GiB are free{'' if holding(found) <= free else ', too few by the estimate'}"
        waiting = ranks.agree_max(found.waiting)
        if CHECKPOINTING in automatic:  # what autograd keeps of a block that waits would stay on the card
            kept = 0 if waiting else -ranks.agree_max(-found.kept)
    counts = {OFFLOAD: waiting, CHECKPOINTING: kept}
    for key in (key for key in asked if key in automatic):
        does = "wait in RAM" if key == OFFLOAD else "keep their activations, the others are computed again"
        callbacks.on_notice(f"{key}: auto; {counts[key]} of {counted(total, 'block')} {does} ({told})")
    return MemoryPlan(waiting, kept)
