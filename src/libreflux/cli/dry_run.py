"""What a run will take, told before any weight is loaded: whether it fits, time, steps, memory, disk, layers."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux import plainjson
from libreflux.errors import DataError
from libreflux.printing import counted, readable

if TYPE_CHECKING:
    from libreflux.data.forecast import Forecast
    from libreflux.recipe import Recipe
    from libreflux.training.phases import Estimate

RECENT = 50  # steps whose rate tells the time left


def report(recipe: Recipe, width: int, *, layers: bool = False, whole: bool = False) -> tuple[str, DataError | None]:
    """What a run takes, whether it fits first: memory by phase, disk, steps and time; no weight is loaded.

    Args:
        recipe: as resolved.
        width: of the terminal.
        layers: whether the table of layers follows.
        whole: whether the resolved recipe and the table of layers follow.

    Returns:
        The text, and what is wrong with the data, for which training would be refused.
    """
    from libreflux.adapter.targets import brief
    from libreflux.cli.terminal import fold
    from libreflux.data.forecast import forecast
    from libreflux.model.facts import trained_facts
    from libreflux.model.known import planned_model
    from libreflux.model.source import open_model
    from libreflux.training.estimate import estimate_recipe
    from libreflux.training.loop import plan_layers

    with planned_model(recipe.model) as (name, notice):
        planned = recipe.model_copy(update={"model": name})
        plan = plan_layers(planned)
        opened = open_model(name)
        tokens = trained_facts(opened.facts, text_padding=recipe.text_padding).max_tokens
        data: Forecast | DataError
        try:
            data = forecast(planned, opened.path, tokens)
        except DataError as error:
            data = error
        texts = None if isinstance(data, DataError) else data.texts
        found = estimate_recipe(planned, text_tokens=tokens, captions=texts)
        on_a_card = _on_a_card(planned, found, tokens, texts)
    lines = [
        *([notice] if notice else []),
        *verdict(recipe, found, on_a_card),
        time_line(recipe),
        steps_line(recipe, data),
        f"adapter: {brief(plan.layers)}",
        f"\nmemory by phase, estimated for prompts of {tokens} tokens\n{found.table()}",
        f"\ndisk, estimated\n{disk_table(recipe, found, data)}",
    ]
    if not whole:
        also = "" if layers else "--layers lists the adapted layers, "
        lines.append(f"\n{also}--all adds {'' if layers else 'them and '}the resolved recipe")
    text = fold("\n".join(lines), width)
    text += f"\n\n{fold(plan.text(width), width)}" if layers or whole else ""
    text += f"\n\n{recipe.to_yaml().rstrip()}" if whole else ""
    return text, data if isinstance(data, DataError) else None


LARGE = 2 * 2**30
"""Bytes of base weights from which one asks for a card, even where none is."""
CARDS = (8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141)
"""Sizes in GB, as cards are sold by; of each some 2 % are the driver's."""


def _on_a_card(recipe: Recipe, found: Estimate, tokens: int, texts: int | None) -> Estimate | None:
    """The estimate for a card of a large model that is planned where none is."""
    from libreflux.training.estimate import estimate_recipe

    if not found.on_cpu or recipe.device != "auto" or found.weights < LARGE:
        return None
    return estimate_recipe(recipe.model_copy(update={"device": "cuda"}), text_tokens=tokens, captions=texts)


def verdict(recipe: Recipe, found: Estimate, on_a_card: Estimate | None = None) -> list[str]:
    """Whether the largest phase fits this machine and, where it has no card, which card it would fit.

    Args:
        recipe: as resolved.
        found: for the device that it would train on here.
        on_a_card: for a card, where there is none.
    """
    if on_a_card is None:
        return [_here(recipe, found, mended=True)]
    return [f"on a card: {_card_for(on_a_card)}", f"without one: {_here(recipe, found, mended=False)}"]


def _here(recipe: Recipe, found: Estimate, *, mended: bool) -> str:
    import psutil
    import torch

    from libreflux.training.memory import smaller_steps

    if found.on_cpu:
        place, size = "this machine's memory", psutil.virtual_memory().total
    elif (card := _own_card(recipe.device)) is not None:
        place, size = "this card's", torch.cuda.get_device_properties(card).total_memory
    else:
        return f"for a card: {_card_for(found)}"
    told = f"at its peak ({found.largest.name}) {_gib(found.reserved)} of {_gib(size)}, {place}"
    if found.reserved <= size:
        return f"fits: {told}"
    if found.total <= size:
        return f"may fit: {told}; {_gib(found.total)} without the allocator's reserve"
    hint = f"; hint: try, in this order, {'; '.join(smaller_steps(recipe))}" if mended else ""
    return f"does not fit: {told}{hint}"


def _own_card(device: str) -> int | None:
    """The number of the card that a recipe's device names; None where this machine does not have it."""
    import torch

    number = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if number is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if number[1] is None else int(number[1])
    return index if index < torch.cuda.device_count() else None


def _card_for(found: Estimate) -> str:
    enough = next((size for size in CARDS if found.reserved <= 0.98 * size * 2**30), None)
    told = f"at its peak ({found.largest.name}) {_gib(found.reserved)}"
    return f"{told}: more than one card has" if enough is None else f"{told}: one of {enough} GB holds it"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


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
            lines.append(f"too little is free in {folder}; hint: lower save.keep, or set out or cache elsewhere")
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
    from libreflux.training.checkpoint import METRICS

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
    from libreflux.training.checkpoint import RECIPE

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
