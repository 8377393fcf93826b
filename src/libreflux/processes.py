"""Which of several processes this is, by the environment that torchrun gives each of them. Loads no torch."""

from __future__ import annotations

import os

from libreflux.errors import RunError


def own_rank() -> tuple[int, int]:
    """(rank, world): this process's number from 0, and how many there are; (0, 1) without torchrun.

    Raises:
        RunError: RANK or WORLD_SIZE is no such number.
    """
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = int(told[0]), int(told[1])
    except ValueError:
        what = "RANK and WORLD_SIZE are not numbers"
        raise RunError(what, where="environment", hint="start it by torchrun") from None
    if not 0 <= rank < world:
        what = f"no process has RANK {rank} of WORLD_SIZE {world}"
        raise RunError(what, where="environment", hint="start it by torchrun, or unset both")
    return rank, world
