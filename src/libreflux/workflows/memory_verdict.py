"""Whether a run fits the memory of the device that it would train on here, or which card would hold it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from libreflux.recipe import Recipe
from libreflux.training.memory import smaller_steps
from libreflux.training.memory_plan import fitted, free_memory
from libreflux.training.phases import Estimate

CARDS = (8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141)
"""Sizes in GB, as cards are sold by; of each some 2 % are the driver's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the largest phase of a run fits the device that the recipe names.

    Attributes:
        estimate: for that device.
        place: whose memory it is; None: a card that is not here.
        size: its bytes; 0 without one.
        smaller: changes of the recipe that need less, in the order to try them.
        on_a_card: the estimate for a card, of a large model where none is; else None.

    What is `auto` in the recipe is decided for the device; for a card that is not here, for the smallest that holds it.
    """

    estimate: Estimate
    place: str | None
    size: int
    smaller: Sequence[str]
    on_a_card: Estimate | None = None

    @property
    def fits(self) -> Literal["fits", "may fit", "does not fit"] | None:
        """ "may fit": without what the allocator reserves on top; None: the device is not here."""
        if self.place is None:
            return None
        if self.estimate.reserved <= self.size:
            return "fits"
        return "may fit" if self.estimate.total <= self.size else "does not fit"

    def lines(self) -> list[str]:
        """One line, or one for a card and one without."""
        if self.on_a_card is None:
            return [self._here(hint=True)]
        return [f"on a card: {_card_for(self.on_a_card)}", f"without one: {self._here(hint=False)}"]

    def _here(self, *, hint: bool) -> str:
        found = self.estimate
        if self.place is None:
            return f"for a card: {_card_for(found)}"
        told = f"{self.fits}: at its peak ({found.largest.name}) {_gib(found.reserved)} of {_gib(self.size)}, "
        told += self.place
        if found.waiting:
            told += f", with {found.waiting} of {len(found.blocks)} blocks in RAM"
        if self.fits == "may fit":
            told += f"; {_gib(found.total)} without the allocator's reserve"
        elif self.fits == "does not fit" and hint:
            told += f"; hint: try, in this order, {'; '.join(self.smaller)}"
        return told


def verdict(recipe: Recipe, estimate: Estimate, on_a_card: Estimate | None = None) -> Verdict:
    """Whether the largest phase fits this machine.

    Args:
        recipe: as resolved.
        estimate: for the device that it would train on here.
        on_a_card: for a card, where there is none.
    """
    place, size = None, 0
    if estimate.on_cpu:
        place, size = "this machine's memory", psutil.virtual_memory().total
        if _is_auto(recipe):
            estimate = fitted(recipe, estimate, free_memory("cpu"))
    elif (card := _own_card(recipe.device)) is not None:
        place, size = "this card's", torch.cuda.get_device_properties(card).total_memory
        if _is_auto(recipe):
            estimate = fitted(recipe, estimate, free_memory(torch.device("cuda", card)))
    else:
        estimate = _on_the_smallest(recipe, estimate)
    if on_a_card is not None:
        on_a_card = _on_the_smallest(recipe, on_a_card)
    return Verdict(estimate=estimate, place=place, size=size, smaller=smaller_steps(recipe), on_a_card=on_a_card)


def _own_card(device: str) -> int | None:
    """The number of the card that a recipe's device names; None where this machine does not have it."""
    number = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if number is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if number[1] is None else int(number[1])
    return index if index < torch.cuda.device_count() else None


def _is_auto(recipe: Recipe) -> bool:
    return "auto" in (recipe.offload_blocks, recipe.gradient_checkpointing)


def _room(card: int) -> float:
    return 0.98 * card * 2**30


def _on_the_smallest(recipe: Recipe, found: Estimate) -> Estimate:
    """As it is fitted to the smallest card that holds it then; as it is where none does."""
    tried = (fitted(recipe, found, _room(card)) for card in CARDS)
    return next((one for one, card in zip(tried, CARDS, strict=False) if one.reserved <= _room(card)), found)


def _card_for(found: Estimate) -> str:
    enough = next((size for size in CARDS if found.reserved <= _room(size)), None)
    told = f"at its peak ({found.largest.name}) {_gib(found.reserved)}"
    if found.waiting:
        told += f" with {found.waiting} of {len(found.blocks)} blocks in RAM, fewer on a larger card"
    return f"{told}: more than one card has" if enough is None else f"{told}: one of {enough} GB holds it"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
