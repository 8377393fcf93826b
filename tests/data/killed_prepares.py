"""Runs ``prepare`` in forked processes that kill themselves, the one after the other, on one cache folder.

Called as a script by test_prepare.py: MODEL DATA OUT. Everything is imported once and no tensor is touched before the
forks, so that each child is a whole process that dies by SIGKILL. Prints the moment and wait status of each child as
JSON.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libreflux.data import cache, encode, prepare
from libreflux.data.cache_spec import CacheSpec
from libreflux.data.crops import View
from libreflux.recipe import DataSource

encode.SHARD_ITEMS = 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_progress(share: float) -> Callable[[int, int, str], None]:
    def report(done: int, total: int, note: str) -> None:
        if done >= share * total:
            die()

    return report


def arm(moment: str) -> Callable[[int, int, str], None] | None:
    """Makes this process die at the moment; returns the progress callback to use."""
    kind, _, number = moment.partition(" ")
    if kind == "progress":
        return at_progress(float(number))
    left = [int(number)] if number else [0]

    def strike() -> None:
        left[0] -= 1
        if left[0] <= 0:
            die()

    if kind == "rename":  # the shard's bytes are written under a temporary name
        real_replace = os.replace

        def replace(old: Path, new: Path) -> None:
            strike()
            real_replace(old, new)

        os.replace = replace  # type: ignore[assignment]
    elif kind == "commit":  # the shard is there, its rows are not
        real = cache.atomic_save_safetensors

        def save(*args: Any) -> None:
            real(*args)
            strike()

        cache.atomic_save_safetensors = save  # type: ignore[assignment]
    return None


def main(model: str, data: str, out: str, moments: list[str]) -> list[tuple[str, int]]:
    statuses = []
    gc.collect()
    gc.freeze()  # children need not look through all that was imported
    for moment in moments:
        child = os.fork()
        if child == 0:
            try:
                progress = arm(moment)
                source = DataSource(path=data, crops_per_picture=2)
                spec = CacheSpec(
                    model=model, data=[source], views=[View("square", 32)], text_padding="drop", out=Path(out)
                )
                prepare.prepare(spec, progress=progress)
                os._exit(0)
            finally:
                os._exit(1)
        statuses.append((moment, os.waitpid(child, 0)[1]))
    gc.unfreeze()  # or libraries complain at the end of what was never freed
    return statuses


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))))
