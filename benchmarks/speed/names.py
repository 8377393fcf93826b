"""The parts by name, and which of them a run has. It imports nothing: a run without arguments needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

PARTS = (
    "limits",
    "layer",
    "optimizer",
    "training-small",
    "guidance",
    "training-large",
    "prepare",
    "checkpoint",
    "start",
    "estimate",
    "optimizer-600m",
    *(COMPILED := ("training-small-compiled", "guidance-compiled", "training-large-compiled")),
)
QUICK = ("limits", "layer", "optimizer", "training-small", "guidance")
LEFT_OUT = {
    "slice": COMPILED,
    "full": ("estimate", "optimizer-600m"),
    "emoji": ("optimizer-600m", *COMPILED),
}
"""By size: the full one's adapter has 600 M parameters anyway, and benchmarks/gpu/recipes.sh measures
its memory. Blocks are compiled where it is asked for, and at the full size."""


def chosen(size: str, quick: bool) -> Sequence[str]:
    """Of a run that names none."""
    return QUICK if quick else [name for name in PARTS if name not in LEFT_OUT[size]]


def wanted(names: Sequence[str], size: str, quick: bool) -> list[str]:
    """In the order to run; the limits come first, since shares are of them.

    Raises:
        ValueError: there is no such part.
    """
    if unknown := sorted(set(names) - set(PARTS)):
        raise ValueError(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return ["limits", *(name for name in names or chosen(size, quick) if name != "limits")]
