"""What a recipe leaves to the estimate: how many blocks of the base wait in RAM, and how many are computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from libreflux.model import offload
from libreflux.model.device import release
from libreflux.model.facts import trained_facts
from libreflux.model.source import ModelSource
from libreflux.printing import counted
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, run_recipe
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
        decided: recipe key -> number, of each that is `auto`.
    """

    waiting: int
    kept: int | None
    decided: Mapping[str, Any] = field(default_factory=dict)


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


def fitted(recipe: Recipe, estimate: Estimate, capacity: float, known: Mapping[str, Any] | None = None) -> Estimate:
    """The estimate with what is `auto` in the recipe decided for a device.

    Args:
        recipe: as resolved.
        estimate: from `estimate_recipe`.
        capacity: bytes of the device.
        known: what was decided when the run began; None: it has not begun.
    """
    waiting, kept = (_number((known or {}).get(key), len(estimate.blocks)) for key in (OFFLOAD, CHECKPOINTING))
    if recipe.offload_blocks == "auto":
        estimate = estimate.offloaded(needed(estimate, capacity) if waiting is None or estimate.on_cpu else waiting)
    if recipe.gradient_checkpointing == "auto":
        count = affordable(estimate, capacity) if kept is None or estimate.waiting else kept
        estimate = estimate.keeping(count)
    return estimate


def _number(value: Any, blocks: int) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= blocks
    return value if good else None


def free_memory(device: torch.device | str) -> int:
    """Bytes of a device that nobody holds: of a card what torch keeps without using it too, of a CPU's a share."""
    if torch.device(device).type != "cuda":
        return int(CPU_MARGIN * psutil.virtual_memory().available)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved - used


def decided_before(recipe: Recipe, run: Path, world: int | None = None) -> dict[str, Any]:
    """What a run that goes on decided when it began; nothing of one that begins, or that is to fork.

    Args:
        recipe: as resolved now.
        run: the run folder.
        world: processes; None: as many as the run has.

    Raises:
        RunError: recipe.json is torn.
    """
    if not checkpoint.listed(run) or not (run / run_recipe.RECIPE).exists():
        return {}
    count = run_recipe.read(run / run_recipe.RECIPE)[1] if world is None else world
    return {} if checkpoint.changes(run, recipe, count) else run_recipe.decided(run)


def plan_memory(
    recipe: Recipe, run: Path, source: ModelSource, device: torch.device | str, ranks: Ranks, callbacks: Callbacks
) -> MemoryPlan:
    """What the recipe says, and what `auto` stands for: decided once, when the run begins, and told.

    Args:
        recipe: as resolved.
        run: the run folder.
        source: the model.
        device: what trains.
        ranks: of several processes the one with the least memory decides.
        callbacks: hears of it.
    """
    total = len(offload.block_names(source.config))
    asked = {OFFLOAD: recipe.offload_blocks, CHECKPOINTING: recipe.gradient_checkpointing}
    begun = decided_before(recipe, run, ranks.world).items()
    known = {key: _number(value, total) for key, value in begun if key in asked}
    automatic = [key for key, value in asked.items() if value == "auto"]
    on_card = torch.device(device).type in offload.DEVICES
    if not on_card:
        known[OFFLOAD] = 0
    decided = {key: known.get(key) for key in automatic}
    told = "as when the run began" if on_card or CHECKPOINTING in automatic else f"of no use on {device}"
    if None in decided.values():
        with callbacks.stage("estimating the memory of the run"):
            release(torch.device(device))
            tokens = trained_facts(source.facts, text_padding=recipe.text_padding).max_tokens
            free = free_memory(device)
            found = fitted(recipe, estimate_recipe(recipe, source, text_tokens=tokens), free, known)
            decided = {OFFLOAD: ranks.agree_max(found.waiting), CHECKPOINTING: -ranks.agree_max(-found.kept)}
            decided = {key: decided[key] for key in automatic}
        told = f"{free / 2**30:,.1f} GiB are free{'' if holding(found) <= free else ', too few by the estimate'}"
    waiting = decided.get(OFFLOAD, recipe.offload_blocks)
    assert isinstance(waiting, int)
    if waiting and CHECKPOINTING in decided:  # what autograd keeps of a block that waits would stay on the card
        decided[CHECKPOINTING] = 0
    for key in automatic:
        does = "wait in RAM" if key == OFFLOAD else "keep their activations, the others are computed again"
        callbacks.on_notice(f"{key}: auto; {decided[key]} of {counted(total, 'block')} {does} ({told})")
    kept = decided.get(CHECKPOINTING, 0 if recipe.gradient_checkpointing else None)
    if not on_card:  # a card decides for itself, and what one decided stays
        decided = {key: value for key, value in decided.items() if key != OFFLOAD}
        decided |= {key: value for key, value in begun if key == OFFLOAD}
    return MemoryPlan(waiting, kept, decided)
