"""How many blocks of a run's base wait in RAM: as the recipe says, or as few as a card's memory asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from libreflux.model import offload
from libreflux.model.device import release
from libreflux.model.facts import trained_facts
from libreflux.model.source import ModelSource
from libreflux.printing import counted
from libreflux.recipe import Recipe
from libreflux.training import run_recipe
from libreflux.training.callbacks import Callbacks
from libreflux.training.estimate import estimate_recipe
from libreflux.training.phases import CARD_RESERVE, Estimate
from libreflux.training.ranks import Ranks

KEY = "offload_blocks"


def check(recipe: Recipe, source: ModelSource, device: torch.device | str) -> None:
    """Raises OptionError for an `offload_blocks` of no use on this device, or more blocks than the model has."""
    if recipe.offload_blocks not in ("auto", 0):
        offload.check_device(device, KEY)
    check_count(recipe, source)


def check_count(recipe: Recipe, source: ModelSource) -> None:
    """Raises OptionError for more blocks than the model has, or too few to save anything."""
    if recipe.offload_blocks != "auto":
        offload.check_count(recipe.offload_blocks, len(offload.block_names(source.config)), KEY)


def needed(estimate: Estimate, capacity: float) -> int:
    """The least number of waiting blocks with which all that holds the base fits, the allocator's reserve included.

    Where none is enough, that of all blocks; on a CPU 0. Preparing comes before the base: it does not count.

    Args:
        estimate: of the run.
        capacity: bytes of the card.
    """
    if estimate.on_cpu:
        return 0

    def fits(count: int) -> bool:
        found = estimate.offloaded(count)
        return CARD_RESERVE * max(phase.peak for phase in (found.training, *found.between)) <= capacity

    return offload.fewest(len(estimate.blocks), fits)


def free_memory(device: torch.device | str) -> int:
    """Bytes of a card that nobody holds, what torch keeps here without using it included."""
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved - used


def decide(
    recipe: Recipe, run: Path, source: ModelSource, device: torch.device | str, ranks: Ranks, callbacks: Callbacks
) -> int:
    """How many blocks wait. What `auto` stands for is decided once, when the run begins, and told.

    Args:
        recipe: as resolved.
        run: the run folder.
        source: the model.
        device: what trains.
        ranks: of several processes the one with the least memory decides.
        callbacks: hears of it.
    """
    if recipe.offload_blocks != "auto":
        return recipe.offload_blocks
    total, known = len(offload.block_names(source.config)), run_recipe.decided(run).get(KEY)
    if torch.device(device).type not in offload.DEVICES:
        count, told = 0, f"of no use on {torch.device(device).type}"
    elif isinstance(known, int) and (known == 0 or offload.LEAST <= known <= total):
        count, told = known, "as when the run began"
    else:
        with callbacks.stage("estimating the memory of the run"):
            release(torch.device(device))
            tokens = trained_facts(source.facts, text_padding=recipe.text_padding).max_tokens
            free = free_memory(device)
            count = ranks.agree_max(needed(estimate_recipe(recipe, source, text_tokens=tokens), free))
        told = f"{free / 2**30:,.1f} GiB of the card are free"
    callbacks.on_notice(f"{KEY}: auto is {count} of {counted(total, 'block')}; {told}")
    return count
