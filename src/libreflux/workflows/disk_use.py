"""The disk that a run and its cache take at their most, beside what is there already and what is free."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from libreflux.data.forecast import Forecast
from libreflux.errors import RunError
from libreflux.printing import counted
from libreflux.recipe import Recipe
from libreflux.training.phases import Estimate

HINT = "lower save.keep, or set out or cache elsewhere"


@dataclass(frozen=True, kw_only=True)
class DiskUse:
    """Bytes on the disks of a run.

    Attributes:
        parts: what is written and its size, all of it at once; the last two are all, and what of it is there already.
        free: folder to what is free on its disk.
        too_small: those of them with less than what is still to be written there.
    """

    parts: tuple[tuple[str, int], ...]
    free: tuple[tuple[Path, int], ...]
    too_small: tuple[Path, ...]

    @property
    def fault(self) -> RunError | None:
        """The refusal of a disk that is too small."""
        return RunError("too little is free", where=self.too_small[0], hint=HINT) if self.too_small else None

    def table(self) -> str:
        """Aligned text."""
        lines = [f"{name:<40}{_told(size):>12}" for name, size in self.parts]
        for folder, free in self.free:
            lines.append(f"{f'free in {folder}':<40}{_told(free):>12}")
            if folder in self.too_small:
                lines.append(f"too little is free in {folder}; hint: {HINT}")
        return "\n".join(lines)


def disk_use(recipe: Recipe, estimate: Estimate, forecast: Forecast | None) -> DiskUse:
    """What a recipe's run and cache take.

    Args:
        recipe: as resolved.
        estimate: of one checkpoint, the averages and the adapter.
        forecast: of the cache; None: its data cannot be read, and it is left out.
    """
    run, save = Path(recipe.out), recipe.save
    stay = recipe.steps // save.keep_every if save.keep_every else 0
    kept = min(save.keep, -(-recipe.steps // save.every)) + stay
    snapshots = recipe.steps // save.averages_every if save.averages_every and recipe.ema else 0
    parts = [(f"checkpoints, {kept} and one being written", (kept + 1) * estimate.checkpoint)]
    if snapshots:
        parts.append((f"averages for hindsight, {snapshots}", snapshots * estimate.averages))
    parts.append(("adapter, the result", estimate.adapter))
    of_run, cache = sum(size for _, size in parts), 0
    if forecast is not None:
        cache = forecast.cache_bytes
        parts.append((f"cache of {counted(forecast.pictures, 'picture')}", cache))
    there = {recipe.cache_dir: _held(recipe.cache_dir)}
    there[run] = _held(run) - (there[recipe.cache_dir] if recipe.cache_dir.is_relative_to(run) else 0)
    more: dict[int, int] = {}  # by disk
    for folder, size in ((run, of_run), (recipe.cache_dir, cache)):
        disk = _existing(folder).stat().st_dev
        more[disk] = more.get(disk, 0) + max(0, size - there[folder])
    folders = dict.fromkeys((_existing(run), _existing(recipe.cache_dir)))
    free = tuple((folder, shutil.disk_usage(folder).free) for folder in folders)
    return DiskUse(
        parts=(*parts, ("all", of_run + cache), ("there already", sum(there.values()))),
        free=free,
        too_small=tuple(folder for folder, size in free if more[folder.stat().st_dev] > size),
    )


def _held(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _told(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
