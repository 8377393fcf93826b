"""What a run will take, told before any weight is loaded: layers, memory, disk, steps and, once it is known, time."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux import plainjson
from libreflux.data.bar import readable
from libreflux.errors import DataError
from libreflux.printing import counted

if TYPE_CHECKING:
    from libreflux.data.forecast import Forecast
    from libreflux.recipe import Recipe
    from libreflux.train.phases import Estimate

RECENT = 50  # steps whose rate tells the time left


def report(recipe: Recipe, width: int) -> tuple[str, DataError | None]:
    """The resolved recipe, its layers, memory by part, disk, steps and time; no weight is loaded, no picture opened.

    Args:
        recipe: as resolved.
        width: of the terminal, for the table of layers.

    Returns:
        The text, and what is wrong with the data, for which training would be refused.
    """
    from libreflux.data.forecast import forecast
    from libreflux.model.facts import trained_facts
    from libreflux.model.family import open_model
    from libreflux.train.estimate import estimate_recipe
    from libreflux.train.loop import plan_layers

    layers = plan_layers(recipe).text(width)
    opened = open_model(recipe.model, parts=())
    assert opened.path is not None
    tokens = trained_facts(opened.facts, text_padding=recipe.text_padding).max_tokens
    data: Forecast | DataError
    try:
        data = forecast(recipe, opened.path, tokens)
    except DataError as error:
        data = error
    texts = None if isinstance(data, DataError) else data.texts
    found = estimate_recipe(recipe, text_tokens=tokens, captions=texts)
    text = "\n".join(
        [
            recipe.to_yaml(),
            layers,
            f"\nmemory by phase, estimated for prompts of {tokens} tokens\n{found.table()}",
            f"\ndisk, estimated\n{disk_table(recipe, found, data)}",
            f"\n{steps_line(recipe, data)}",
            time_line(recipe),
        ]
    )
    return text, data if isinstance(data, DataError) else None


def disk_table(recipe: Recipe, found: Estimate, data: Forecast | DataError) -> str:
    """Bytes by part at their most, what of it is there already, and what is free."""
    run, save = Path(recipe.out), recipe.save
    stay = recipe.steps // save.keep_every if save.keep_every else 0
    kept = min(save.keep, -(-recipe.steps // save.every)) + stay
    snapshots = recipe.steps // save.averages_every if save.averages_every and recipe.ema else 0
    rows = [(f"checkpoints, {kept} and one being written", (kept + 1) * found.checkpoint)]
    if snapshots:
        rows.append((f"averages for hindsight, {snapshots}", snapshots * found.averages))
    rows.append(("adapter, the result", found.adapter))
    if not isinstance(data, DataError):
        rows.append((f"cache of {counted(data.pictures, 'picture')}", data.cache_bytes))
    cache = 0 if isinstance(data, DataError) else data.cache_bytes
    of_run = sum(size for _, size in rows) - cache
    inside = recipe.cache_dir.is_relative_to(run)
    there = {recipe.cache_dir: _held(recipe.cache_dir)}
    there[run] = _held(run) - (there[recipe.cache_dir] if inside else 0)
    rows += [("all", of_run + cache), ("there already", sum(there.values()))]
    lines = [f"{name:<40}{_told(size):>12}" for name, size in rows]
    more: dict[int, int] = {}  # by disk
    for folder, size in ((run, of_run), (recipe.cache_dir, cache)):
        disk = _existing(folder).stat().st_dev
        more[disk] = more.get(disk, 0) + max(0, size - there[folder])
    for folder in dict.fromkeys((_existing(run), _existing(recipe.cache_dir))):
        free = shutil.disk_usage(folder).free
        lines.append(f"{f'free in {folder}':<40}{_told(free):>12}")
        if more[folder.stat().st_dev] > free:
            lines.append(f"too little is free in {folder}; mend: lower save.keep, or set out or cache elsewhere")
    if isinstance(data, DataError):
        lines.append(f"the cache comes on top: {data}")
    return "\n".join(lines)


def steps_line(recipe: Recipe, data: Forecast | DataError) -> str:
    """Steps, pictures and epochs on one device."""
    pictures = recipe.batch * recipe.accumulate
    line = f"{counted(recipe.steps, 'step')} of {counted(pictures, 'picture')} on each device"
    if isinstance(data, DataError):
        return line
    shown = f"{data.visits:,.0f}" if data.visits >= 10 else readable(data.visits)
    epochs = readable(recipe.steps * pictures / data.visits, 2)
    return f"{line}; an epoch shows {shown}: {epochs} epoch{'' if epochs == '1' else 's'} on one device"


def time_line(recipe: Recipe) -> str:
    """Time left, from the rate of this run's last steps; before there are some it cannot be known."""
    from libreflux.cli.progress import clock
    from libreflux.train.checkpoint import METRICS

    path = Path(recipe.out) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines()[-RECENT:] if path.is_file() else []
    rows = [row for line in lines if (row := _row(line))]
    if not rows:
        return "time: known only after the first steps, from their rate: `train` shows it, and so does --dry-run then"
    step, rate = rows[-1][0], statistics.median(rate for _, rate in rows)
    left = max(0, recipe.steps - step) * recipe.batch * recipe.accumulate * _processes(recipe) / rate
    told = f"the {readable(rate)} pictures/s of the last {counted(len(rows), 'step')}"
    return f"time: {clock(left)} for the steps after {step:,}, at {told}"


def _processes(recipe: Recipe) -> int:
    """How many this run was begun on, all of which its rate counts; 1 before it has begun."""
    from libreflux.train.checkpoint import RECIPE

    try:
        return int(plainjson.parse((Path(recipe.out) / RECIPE).read_text(encoding="utf-8"))["world"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def _row(line: str) -> tuple[int, float] | None:
    """(step, pictures per second); None for a line that a kill cut short, or of a step without a rate."""
    try:
        row = plainjson.parse(line)
        step, rate = int(row["step"]), float(row["pictures_per_second"])
    except (ValueError, KeyError, TypeError):
        return None
    return (step, rate) if rate > 0 else None


def _held(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _told(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
