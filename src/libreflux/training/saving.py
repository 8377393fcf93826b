"""What a run keeps on disk and goes on from: its state as a checkpoint, and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from libreflux import __version__, files
from libreflux.adapter.adapter import Adapter
from libreflux.adapter.io import file_metadata, load_adapter, save_adapter
from libreflux.adapter.lineage import told_lineage
from libreflux.errors import RunError
from libreflux.model.stream import save_live
from libreflux.model.w8a8 import kind_for
from libreflux.printing import get_logger
from libreflux.recipe import Recipe
from libreflux.training import checkpoint, ema, forks, nonfinite, run_recipe, training_adapter
from libreflux.training.callbacks import Callbacks
from libreflux.training.checkpoint import Checkpoint
from libreflux.training.compiled import COMPILED
from libreflux.training.step import Training

log = get_logger(__name__)

ARITHMETIC = 2
"""A number for the order of our own roundings: LoKr, attention's gradient, int8 products. 1: before it was kept."""


def restore(training: Training, newest: Checkpoint, fork: bool) -> None:
    """Puts a run where `newest` left it.

    Raises:
        RunError: the base has changed, the data has without `fork`, a held-out picture was trained on before a fork,
            or the averages do not fit.
    """
    state = newest.state()
    if state["model_hash"] != training.identity["model_hash"]:
        hint = "put them back as they were, or choose another `out`"
        told = "the weights of the base model have changed since this run began"
        if model := run_recipe.moved(training.run, training.recipe).get("model"):
            told += f": {run_recipe.told_changes({'model': model})}"
        raise RunError(told, where=newest.path, hint=hint)
    recipe, world, now = training.recipe, training.ranks.world, training.identity["data_hash"]
    training.forks = forks.history(training.run, recipe, world, newest.step, state, now, fork=fork)
    forks.refuse_trained(recipe, training.forks, training.held_out)
    here = _machine(training.device, training.recipe.base)
    for key, value in here.items():
        before = re.sub(r"^cuda:\d+", "cuda", str(state.get(key, 1 if key == "arithmetic" else None)))
        if key == "activations" and key in state and before != str(value):
            log.warning("activations are rounded to %s from here on, instead of %s: another precision", value, before)
        elif key != "activations" and before != str(value):
            log.warning("resumed with %s %s instead of %s: the result may differ in its last bits", key, value, before)
    for key, (then, value) in run_recipe.last_bits_changed(training.run, recipe).items():
        log.warning("resumed with %s %s instead of %s: the result may differ in its last bits", key, value, then)
    if bool(state.get(COMPILED)) != (training.compiled is not None):
        pair = ("compiled", "plain") if training.compiled else ("plain", "compiled")
        log.warning("resumed with %s blocks instead of %s ones: the result may differ in its last bits", *pair)
    training.adapter.load_state_dict(load_adapter(newest.adapter).tensors)
    training.optimizer.load_state_tensors(load_file(newest.optimizer))  # mapped: read as it is copied, never whole
    _restore_heads(training, newest)
    if training.recipe.ema and training.ranks.first:
        if not newest.averages.exists():
            hint = "set ema: [] to go on without, or choose another `out`"
            raise RunError("this checkpoint has no averages", where=newest.path, hint=hint)
        kept = load_file(newest.averages)
        with safetensors.safe_open(newest.averages, framework="pt") as file:
            training.averages.load(kept, ema.step_of(file.metadata(), newest.step))
        dropped = {key.partition("/")[0] for key in kept if "/" in key} - {repr(width) for width in recipe.ema}
        if dropped:
            log.warning("averages of width %s are kept up to step %d only", ", ".join(sorted(dropped)), newest.step)
    elif training.ranks.first and newest.averages.exists():
        log.warning("no averages are kept after step %d", newest.step)
    training.step = newest.step
    training.skips = nonfinite.Skips(**state.get("skips", {}))
    if training.forks and training.forks[-1]["step"] == newest.step:
        training.skips.in_a_row = 0  # the change is what should end them


def _restore_heads(training: Training, newest: Checkpoint) -> None:
    """Raises RunError where the recipe has an adversary and the checkpoint has none, or the other way round."""
    adversary = training.adversary
    if (adversary is None) != (not newest.heads.exists()):
        told = "heads of an adversary, and the recipe wants none" if adversary is None else "no heads of an adversary"
        hint = "begin in another `out`, with this run's adapter as adapter.init_from"
        raise RunError(f"this checkpoint has {told}", where=newest.path, hint=hint)
    if adversary is not None:
        moments = load_file(newest.path / checkpoint.HEADS_OPTIMIZER)
        adversary.load(load_file(newest.heads), moments, newest.path)


def save(training: Training, metrics: checkpoint.Metrics | None, callbacks: Callbacks) -> Checkpoint:
    """Writes a checkpoint (the first process alone, that has `metrics`) and prunes older ones."""
    recipe, step = training.recipe, training.step
    training.require_replicas()
    if metrics is None:
        return Checkpoint(step, checkpoint.step_folder(training.run, step))
    writers: dict[str, checkpoint.Writer] = {
        checkpoint.ADAPTER: lambda path: save_adapter(training.adapter, path, _origin(training)),
        checkpoint.OPTIMIZER: lambda path: save_live(path, training.optimizer.state_dict_tensors()),
    }
    if (adversary := training.adversary) is not None:
        writers[checkpoint.HEADS] = lambda path: save_live(path, adversary.state_dict())
        writers[checkpoint.HEADS_OPTIMIZER] = lambda path: save_live(path, adversary.optimizer.state_dict_tensors())
    if recipe.ema:
        writers[checkpoint.AVERAGES] = lambda path: _write_averages(training, path)
    metrics.sync()
    written = checkpoint.write(
        training.run,
        step,
        writers,
        {
            "recipe": recipe.fingerprint(training.ranks.world),
            "skips": dataclasses.asdict(training.skips),
            **training.identity,
            **_machine(training.device, training.recipe.base),
            **({COMPILED: True} if training.compiled else {}),
        },
    )
    prune(recipe, training.run, training.skips)
    callbacks.on_save(step, written.path)
    return written


def prune(recipe: Recipe, run: Path, skipped: nonfinite.Skips) -> None:
    """Deletes checkpoints as `save` says, but none while steps are skipped: those are what is left to go back to."""
    if not skipped.in_a_row:
        checkpoint.prune(run, recipe.save.keep, recipe.save.keep_every)


def _origin(training: Training) -> dict[str, str]:
    """What an adapter file says of its making."""
    return {
        "model": training.recipe.model,
        "model_hash": training.identity["model_hash"],
        **told_lineage(training.source.facts.lineage),
        "recipe": training.recipe.fingerprint(training.ranks.world),
        "step": str(training.step),
        "text_padding": training.facts.text_padding,
        "max_tokens": str(training.facts.max_tokens),
        "sampling_steps": str(training.facts.steps),
        "guidance": str(training.facts.guidance),
        "licence": training.facts.licence,
        "libreflux": __version__,
        **training_adapter.metadata(training.recipe, training.beside, training.ranks.world),
        **({"forked_at": " ".join(str(one["step"]) for one in training.forks)} if training.forks else {}),
    }


def averaged(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors that averages are kept of, by their name in an adapter file: all but the constant alpha."""
    return {name: tensor for name, tensor in adapter.state_dict().items() if not name.endswith(".alpha")}


def _write_averages(training: Training, path: Path) -> None:
    alphas = {name: value for name, value in training.adapter.state_dict().items() if name.endswith(".alpha")}
    metadata = {**_origin(training), **file_metadata(training.adapter)}
    ema.write_averages(training.averages, alphas, path, metadata, training.step)


def write_snapshot(training: Training) -> None:
    """Keeps the averages of this step for hindsight."""
    with files.staged_dir(ema.snapshot_path(training.run, training.step)) as folder:
        _write_averages(training, folder / checkpoint.AVERAGES)
        files.write_manifest(folder)


def _machine(device: str, base: str) -> dict[str, Any]:
    """What the last bits of a result depend on besides the recipe; not on the number of the card, of its kind alone."""
    activations = {"activations": kind_for(device)} if base == "w8a8" else {}
    kind = torch.device(device).type
    chip = torch.cuda.get_device_name(device) if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    ours = {"arithmetic": ARITHMETIC, **activations}
    return {"torch": torch.__version__, "threads": threads, "device": f"{kind} ({chip})", **ours}
