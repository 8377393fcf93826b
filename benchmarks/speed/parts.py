"""What each part of `names.PARTS` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import drawing, layer, machine, optimizers, passes, runs, sizes
from benchmarks.speed.flops import guided_flops, tokens_of, training_flops
from benchmarks.speed.ratios import Measured
from benchmarks.speed.results import Figure, Found, Row
from benchmarks.speed.sizes import SIZES, Size
from benchmarks.speed.timing import Contender, take_turns

CAPTION = 64
"""Tokens of the caption in a training step."""
QUICK = (passes.OURS, passes.STACK, passes.OURS_W8A8, passes.OURS_BF16, drawing.DIFFUSERS)
"""Who takes part in the passes of a quick run, and in a CPU's long ones: 512 px take the others minutes."""


@dataclass(frozen=True)
class Setting:
    """How a part is to run.

    Attributes:
        size: a name of `sizes.SIZES`.
        device: cpu or cuda.
        quick: fewer rounds, contenders and pixels.
        room: bytes that contenders may hold together.
        work: a folder for what is made on the way.
        only: contenders by name; None: all.
    """

    size: str
    device: str
    quick: bool
    room: float
    work: Path
    only: frozenset[str] | None = None

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    def turns(self, contenders: list[Contender], rounds: int) -> list[Measured]:
        """`timing.take_turns` of those that take part."""
        chosen = [one for one in contenders if self.only is None or one.name in self.only]
        return take_turns(chosen, rounds=rounds, device=self.device, room=self.room) if chosen else []


def limits(setting: Setting) -> Found:
    """The machine's own."""
    found = machine.limits(setting.device, setting.size)
    figures = [
        Figure(f"largest product in {kind}", found[kind], "10¹² operations/s")
        for kind in ("bf16", "int8", "fp8")
        if kind in found and (kind != "fp8" or setting.device == "cuda")
    ]
    return Found(figures=[*figures, Figure("memory, a copy", found["copy_gb_s"], "GB/s")], limits=found)


def training(setting: Setting, which: int, *, compiled: bool = False) -> Found:
    """A training step at the size's smaller or larger picture."""
    size, side = setting.shape, setting.shape.sides[which]
    made = passes.compiled_contenders if compiled else passes.contenders
    found = made(size, side, CAPTION, setting.device)
    if not compiled and (setting.quick or (which and setting.size == "slice")):
        found = [one for one in found if one.name in QUICK]
    measured = setting.turns(found, 2 if setting.quick or which else size.rounds)
    flops = training_flops(size, tokens_of(side), CAPTION)
    title = f"training step, {side} px, caption of {CAPTION} tokens"
    return Found([Row(title, (passes.STACK, passes.OURS_BF16), flops, measured)])


def guidance(setting: Setting, *, compiled: bool = False) -> Found:
    """A guided step; in a quick run of the smaller picture."""
    size = setting.shape
    side = min(size.sides[0], size.drawn) if setting.quick else size.drawn
    made = drawing.compiled_contenders if compiled else drawing.contenders
    found = made(size, side, setting.device)
    if setting.quick and not compiled:
        found = [one for one in found if one.name in QUICK]
    measured = setting.turns(found, 1 if setting.quick else size.rounds)
    flops = guided_flops(size, tokens_of(side), drawing.TOKENS)
    title = f"step of guidance, {side} px, prompts of {drawing.TOKENS[0]} and {drawing.TOKENS[1]} tokens"
    return Found([Row(title, (passes.STACK, drawing.DIFFUSERS, passes.OURS_BF16), flops, measured)])


def adapted_layer(setting: Setting) -> Found:
    """LoKr on one linear, at the tokens of the size's larger picture."""
    size = setting.shape
    rows = tokens_of(size.sides[-1]) + CAPTION
    measured = setting.turns(layer.contenders(size, rows, setting.device), 3 if setting.quick else 7)
    title = f"LoKr factor {layer.FACTOR} on {size.width} → {4 * size.width}, forward and backward, {rows} rows"
    return Found([Row(title, (layer.BARE, "lycoris, bypass"), None, measured)])


def optimizer(setting: Setting, of: str | None = None) -> Found:
    """Of the size's adapter, or of another size's."""
    size = setting.shape if of is None else sizes.SIZES[of]
    count = sum(rows * columns for rows, columns in optimizers.shapes(size))
    measured = setting.turns(optimizers.contenders(size, setting.device), 3 if setting.quick else 5)
    title = (
        f"optimizer step, {count / 1e6:,.0f} M parameters" if count > 2e6 else f"optimizer step, {count:,} parameters"
    )
    return Found([Row(title, (optimizers.BEFORE, "torch AdamW, bf16, fused"), None, measured)])


def preparing(setting: Setting) -> Found:
    """The emoji family's own parts on its own pictures, by the path that `libreflux prepare` takes."""
    count = 16 if setting.size == "emoji" else 64 if setting.quick else 256
    return Found(figures=runs.prepared(setting.work, count, setting.device))


def checkpoints(setting: Setting) -> Found:
    """Saving and loading the size's adapter."""
    saving, loading = runs.checkpoints(setting.shape, setting.work, setting.device)
    turns = 3 if setting.size == "emoji" else 5
    found = [
        Row("saving a checkpoint, adapter and moments", (runs.TORCH_SAVE,), None, setting.turns(saving, turns)),
        Row("loading a checkpoint, adapter and moments", ("torch.load",), None, setting.turns(loading, turns)),
    ]
    return Found(found)


def start(setting: Setting) -> Found:
    """From the command to the end of the first step, emoji-base."""
    measured = setting.turns(runs.starts(setting.work, setting.device), 1 if setting.size == "emoji" else 3)
    return Found([Row("a new process, emoji-base, until one step is saved", (), None, measured)])


def estimate(setting: Setting) -> Found:
    """The estimate of `train --dry-run` beside the peak of a real run; see benchmarks/memory.py."""
    return Found(figures=runs.estimates(setting.size, setting.work))


Part = Callable[[Setting], Found]
WORK: dict[str, Part] = {
    "limits": limits,
    "layer": adapted_layer,
    "optimizer": optimizer,
    "training-small": lambda setting: training(setting, 0),
    "guidance": guidance,
    "training-large": lambda setting: training(setting, 1),
    "prepare": preparing,
    "checkpoint": checkpoints,
    "start": start,
    "estimate": estimate,
    "optimizer-600m": lambda setting: optimizer(setting, "full"),
    "training-small-compiled": lambda setting: training(setting, 0, compiled=True),
    "guidance-compiled": lambda setting: guidance(setting, compiled=True),
    "training-large-compiled": lambda setting: training(setting, 1, compiled=True),
}


def as_json(name: str, found: Found, limit: float | None) -> dict[str, Any]:
    """A part's file, less what the machine and the clock say."""
    tree: dict[str, Any] = {
        "part": name,
        "rows": [row.as_json(limit) for row in found.rows],
        "figures": [vars(one) for one in found.figures],
    }
    return tree | ({} if found.limits is None else {"limits": found.limits})


def limit_of(parts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The measured limit in bf16 among parts that are done."""
    found = parts.get("limits", {}).get("limits", {}).get("bf16")
    return float(found) if found else None
