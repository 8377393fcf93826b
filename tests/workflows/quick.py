"""A probe that measures as little as it can, and still everything."""

from __future__ import annotations

import pytest

from libreflux.probing.settings import QUICK
from libreflux.workflows import probe_measure

LESS = {
    "sigmas": (0.5,),
    "draw_steps": 2,
    "diversity_prompts": 2,
    "diversity_seeds": 2,
    "negative_prompts": 2,
    "padding_pictures": 2,
    "padding_sigmas": (0.5,),
    "padding_tokens": (20,),
}


def measure_less(patch: pytest.MonkeyPatch) -> None:
    """What `quick` stands for measures less, on pictures of at most 64 px, until the patch is undone."""
    own_side = probe_measure.own_side
    patch.setattr(probe_measure, "own_side", lambda *configs: min(64, own_side(*configs)))
    for name, value in LESS.items():
        patch.setitem(QUICK, name, value)
