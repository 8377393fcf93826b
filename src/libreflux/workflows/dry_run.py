"""What a run will take, known before any weight is loaded: whether it fits, time, steps, memory, disk, layers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from libreflux import plainjson
from libreflux.adapter.plan import Plan
from libreflux.adapter.targets import brief
from libreflux.data.forecast import Forecast, forecast
from libreflux.errors import DataError, LibrefluxError
from libreflux.model.facts import trained_facts
from libreflux.model.known import planned_model
from libreflux.model.offload import check_device
from libreflux.model.opening import open_model
from libreflux.printing import clock, counted, fold, readable
from libreflux.recipe import Recipe
from libreflux.training.checkpoint import METRICS, RECIPE
from libreflux.training.compiled import is_here, planned_line, require_compiler
from libreflux.training.estimate import estimate_recipe
from libreflux.training.flow_objective import extra_passes, second_passes
from libreflux.training.memory_plan import check_count
from libreflux.training.phases import Estimate
from libreflux.training.planned import plan_layers
from libreflux.workflows.disk_use import DiskUse, disk_use
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.memory_verdict import Verdict, verdict
from libreflux.workflows.recipes import RecipeArgument, resolve_recipe

RECENT = 50  # steps whose rate tells the time left
UNKNOWN = "time: known only after the first steps, from their rate: `train` shows it, and so does --dry-run then"
LARGE = 2 * 2**30
"""Bytes of base weights from which one asks for a card, even where none is."""


@dataclass(frozen=True)
class DryRunOptions:
    """Which run.

    Attributes:
        recipe: a recipe, the path of its YAML file, or a tree of its keys and values.
        overrides: `key=value` texts over it, values in YAML.
    """

    recipe: RecipeArgument
    _: KW_ONLY
    overrides: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """From the rate of a run's own last steps.

    Attributes:
        seconds: for the steps that are left.
        step: finished steps.
        rate: pictures in a second, on all devices; the median of the last steps.
        steps: how many steps that is the rate of.
    """

    seconds: float
    step: int
    rate: float
    steps: int

    def line(self) -> str:
        """For people."""
        told = f"the {readable(self.rate)} pictures/s of the last {counted(self.steps, 'step')}"
        return f"time: {clock(self.seconds)} for the steps after {self.step:,}, at {told}"


@dataclass(frozen=True, kw_only=True)
class DryRunResult:
    """What a run takes.

    Attributes:
        recipe: as resolved.
        notice: what is said of a model that is not here; None of one that is.
        verdict: whether it fits, with the estimated bytes of each phase.
        text_tokens: of the longest prompt, for which memory is estimated.
        plan: the adapted layers.
        compile: what is known of compiling blocks; None: nothing is to be said.
        forecast: of the data; None: they would be refused.
        disk: what is written, and what is free.
        time_left: None before there are steps with a rate.
        fault: why training would be refused: the data, the disk, `offload_blocks` without a card, or `compile` without
            a compiler; None: nothing is known against it.
    """

    recipe: Recipe
    notice: str | None
    verdict: Verdict
    text_tokens: int
    plan: Plan
    compile: str | None
    forecast: Forecast | None
    disk: DiskUse
    time_left: TimeLeft | None
    fault: LibrefluxError | None

    def text(self, width: int = 80, *, layers: bool = False, whole: bool = False) -> str:
        """The report of `libreflux train --dry-run`.

        Args:
            width: characters of a line.
            layers: whether the table of layers follows.
            whole: whether the resolved recipe and the table of layers follow.
        """
        disk = self.disk.table()
        if self.forecast is None:
            disk += f"\nthe cache comes on top: {self.fault}"
        lines = [
            *([self.notice] if self.notice else []),
            *self.verdict.lines(),
            UNKNOWN if self.time_left is None else self.time_left.line(),
            steps_line(self.recipe, self.forecast),
            *passes_lines(self.recipe),
            f"adapter: {brief(self.plan.layers)}",
            *([self.compile] if self.compile else []),
            f"\nmemory by phase, estimated for prompts of {self.text_tokens} tokens\n{self.verdict.estimate.table()}",
            f"\ndisk, estimated\n{disk}",
        ]
        if not whole:
            also = "" if layers else "--layers lists the adapted layers, "
            lines.append(f"\n{also}--all adds {'' if layers else 'them and '}the resolved recipe")
        text = fold("\n".join(lines), width)
        text += f"\n\n{fold(self.plan.text(width), width)}" if layers or whole else ""
        return text + (f"\n\n{self.recipe.to_yaml().rstrip()}" if whole else "")


def dry_run_with(options: DryRunOptions) -> DryRunResult:
    """Find out what a run takes; no weight is loaded, nothing is written.

    Raises:
        RecipeError: the recipe; see `recipe.load_recipe`.
        LibrefluxError: a fault of the model or the targets. One of the data is in the result.

    Example::

        import libreflux

        libreflux.demo_data("pictures", count=8)
        recipe = {"model": "emoji-base", "data": [{"path": "pictures"}], "resolution": 64, "steps": 2, "out": "run"}
        found = libreflux.dry_run(recipe)
        print(found.verdict.fits, found.verdict.estimate.total, found.fault)
        print(found.text())
    """
    recipe = resolve_recipe(options.recipe, options.overrides)
    with planned_model(recipe.model) as (name, notice):
        planned = recipe.model_copy(update={"model": name})
        opened = open_model(name)
        check_count(planned, opened)
        plan = plan_layers(planned, opened)
        tokens = trained_facts(opened.facts, text_padding=recipe.text_padding).max_tokens
        data, fault = None, None
        try:
            data = forecast(planned, opened.path, tokens)
        except DataError as error:
            fault = error
        texts = None if data is None else data.texts
        estimate = estimate_recipe(planned, opened, text_tokens=tokens, captions=texts)
        on_a_card = None
        if estimate.on_cpu and planned.device == "auto" and estimate.weights >= LARGE:
            on_a_card = estimate_recipe(
                planned.model_copy(update={"device": "cuda"}), opened, text_tokens=tokens, captions=texts
            )
    disk = disk_use(recipe, estimate, data)
    return DryRunResult(
        recipe=recipe,
        notice=notice,
        verdict=verdict(recipe, estimate, on_a_card),
        text_tokens=tokens,
        plan=plan,
        compile=_compiling(recipe, estimate, on_a_card),
        forecast=data,
        disk=disk,
        time_left=time_left(recipe),
        fault=fault or disk.fault or _refused_here(recipe, estimate),
    )


def _compiling(recipe: Recipe, estimate: Estimate, on_a_card: Estimate | None) -> str | None:
    found, where = (estimate, "") if on_a_card is None else (on_a_card, "on a card ")
    device = "cpu" if found.on_cpu else "cuda"
    told = planned_line(recipe, found.kinds, len(found.blocks), device)
    return None if told is None else f"compile: {recipe.compile}; {where}{told}"


def _refused_here(recipe: Recipe, estimate: Estimate) -> LibrefluxError | None:
    """Why this machine would not begin such a run: blocks that wait without a card, or no compiler."""
    device = "cpu" if estimate.on_cpu else "cuda"
    try:
        if recipe.offload_blocks not in ("auto", 0):
            check_device(device)
        if is_here(device):
            require_compiler(recipe, device)
    except LibrefluxError as error:
        return error
    return None


def steps_line(recipe: Recipe, data: Forecast | None) -> str:
    """Steps, pictures and epochs on one device."""
    pictures = recipe.batch * recipe.accumulate
    line = f"{counted(recipe.steps, 'step')} of {counted(pictures, 'picture')} on each device"
    if data is None:
        return line
    shown = f"{data.visits:,.1f}".removesuffix(".0") if data.visits >= 10 else readable(data.visits)
    epochs = readable(recipe.steps * pictures / data.visits, 2)
    return f"{line}; an epoch shows {shown}: {epochs} epoch{'' if epochs == '1' else 's'} on one device"


def passes_lines(recipe: Recipe) -> list[str]:
    """What `guided_target` and `hold_base` add to a step; nothing without them."""
    added = extra_passes(recipe)
    if not added:
        return []
    told = " and ".join(f"{readable(count, 2)} for {key}" for key, count in added.items())
    # The base is frozen: its backward pass costs about as much as a forward one, and checkpointing a second of those.
    own = 2 if recipe.gradient_checkpointing is False else 3
    second = second_passes(recipe)
    longer = readable((own * (1 + second) + sum(added.values())) / own, 2)
    also = f", {readable(second, 2)} more with gradient for hold_base without the training adapter" if second else ""
    line = f"passes for each picture: one with gradient{also}, and without gradient {told}"
    return [f"{line}: a step takes about {longer} times as long as without (estimated)"]


def time_left(recipe: Recipe) -> TimeLeft | None:
    """From the rate of this run's last steps; None before there are some."""
    path = Path(recipe.out) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines()[-RECENT:] if path.is_file() else []
    rows = [row for line in lines if (row := _row(line))]
    if not rows:
        return None
    step, rate = rows[-1][0], statistics.median(rate for _, rate in rows)
    seconds = max(0, recipe.steps - step) * recipe.batch * recipe.accumulate * _processes(recipe) / rate
    return TimeLeft(seconds=seconds, step=step, rate=rate, steps=len(rows))


def _processes(recipe: Recipe) -> int:
    """How many this run was begun on, all of which its rate counts; 1 before it has begun."""
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


dry_run = by_keywords(DryRunOptions, dry_run_with)
