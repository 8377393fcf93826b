"""fit(): from a recipe to a trained adapter. The same call again resumes, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from libreflux import files
from libreflux.adapter import plan
from libreflux.data.batches import Batches
from libreflux.data.held_out import HeldOut
from libreflux.data.prepare import prepare_cache, prepare_recipe
from libreflux.errors import ModelError, RunError
from libreflux.model import attention, numerics
from libreflux.model.device import make_current, multiplies_bf16, pick_device
from libreflux.model.offload import BlockOffload, blocks_of, spread, waiting_names
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.model.w8a8 import kind_for, quantise_activations
from libreflux.places import folder_place
from libreflux.printing import get_logger
from libreflux.recipe import Recipe
from libreflux.training import (
    adversary,
    checkpoint,
    ema,
    memory,
    memory_plan,
    nonfinite,
    run_state,
    saving,
    training_adapter,
)
from libreflux.training.callbacks import Callbacks, StepInfo
from libreflux.training.checkpoint import Checkpoint
from libreflux.training.compiled import compiled_blocks, errors_of, require_compiler, uncompiled
from libreflux.training.interrupt import Interrupted, StopRequest
from libreflux.training.optimizer import make_optimizer, parameter_dtype
from libreflux.training.optimizer8 import require_8bit
from libreflux.training.planned import BASE_DTYPES, INT8_BASES, plan_layers
from libreflux.training.ranks import Ranks, joined
from libreflux.training.run_state import RunState
from libreflux.training.step import Training

log = get_logger(__name__)

WITHOUT_BF16 = "this CPU has no instructions for bf16: where memory allows it, `base: fp32` may be much faster"


def fit(recipe: Recipe, callbacks: Callbacks | None = None, *, fork: bool = False) -> Path:
    """Trains what the recipe says, from where its run folder stands.

    Every random number is a function of (seed, purpose, step or sample), so a run that was stopped or killed at any
    moment ends with the same bytes as one that was not, on the same machine and thread count.

    Args:
        recipe: see `recipe.Recipe`; `recipe.out` is the run folder.
        callbacks: who listens.
        fork: whether the recipe and the data may have changed since the run began; see `training.forks`.

    Returns:
        RUN/adapter.safetensors.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP; the step was finished and saved.
        RunError: another process holds the run folder, the recipe, data or base have changed since the run began,
            training would write over a result (see `training.run_state`), too many steps in a row were skipped (see
            `training.nonfinite`), or memory ran out.
        LibrefluxError: a fault of the model, the data or the targets; see its kinds.
    """
    callbacks = callbacks or Callbacks()
    run, device = Path(recipe.out), str(pick_device(recipe.device))
    if device.startswith("mps"):
        raise RunError("training on MPS is not supported yet", where="device", hint="set device: cpu")
    with contextlib.ExitStack() as held:
        if recipe.deterministic:
            held.enter_context(numerics.deterministic(device))  # first: cuBLAS reads its workspace once
        with memory.explained("starting", recipe):
            make_current(device)
        ranks = held.enter_context(joined(device))
        held.enter_context(numerics.pinned(device))
        where = ranks.in_turn(lambda: _locked(recipe, run, ranks.world, held, fork), lambda: run_state.read_state(run))
        done = where.newest
        if done is None or where.left(recipe):
            heard = callbacks if ranks.first else Callbacks()
            with _threads(recipe.threads), memory.explained("loading or saving", recipe):
                done = _train(open_for_training(recipe, run, done, heard, ranks, device, fork), heard, done)
        return ranks.in_turn(lambda: _finish(recipe, run, done), lambda: run / checkpoint.ADAPTER)


def _locked(recipe: Recipe, run: Path, world: int, held: contextlib.ExitStack, fork: bool) -> RunState:
    folder_place(run, *checkpoint.WRITTEN, *(["tensorboard"] if recipe.tensorboard else []))
    held.enter_context(files.lock(run))
    return run_state.settle(recipe, run, world, fork=fork)


def _finish(recipe: Recipe, run: Path, last: Checkpoint) -> Path:
    saving.prune(recipe, run, nonfinite.Skips(**last.state().get("skips", {})))  # a kill may have come before this
    return checkpoint.publish(run, last)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's CPU threads for a while; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(training: Training, callbacks: Callbacks, newest: Checkpoint | None) -> Checkpoint:
    """Steps from where `training` stands, at `newest`, to the recipe's last; returns the checkpoint of that.

    What is due at the step where it stands is drawn and measured again: a kill may have come before or within it.
    """
    recipe, ranks, first = training.recipe, training.ranks, training.step
    opened = _metrics(training)
    if ranks.first:
        ema.rewind(training.run, first)  # like the metrics before the claim: what is left there then is of this recipe
        checkpoint.claim(training.run, recipe, ranks.world, training.forks)
    callbacks.on_start(training.started())
    if training.adversary is not None and training.held_out is not None and recipe.held_out.every:
        callbacks.on_notice(adversary.ON_HELD_OUT)
    if recipe.base in ("bf16", "int8") and not multiplies_bf16(training.device):
        callbacks.on_notice(WITHOUT_BF16)
    saved = newest
    with StopRequest() as stop, opened as metrics:
        if training.held_out is not None and run_state.measure_due(recipe, first):
            _measure(training, training.held_out, callbacks)
        if run_state.sample_due(recipe, first):
            _sample(training, callbacks)
        while training.step < recipe.steps:
            signum = ranks.agree_max(stop.signum or 0)
            if signum:
                break
            try:
                with memory.explained(f"step {training.step + 1}", recipe), errors_of(training.compiled):
                    info = training.take_step()
            except ModelError:  # a signal to the whole group ends the compiler's own processes too
                signum = stop.signum or 0
                if not signum or training.compiled is None or ranks.world > 1:
                    raise
                break
            if metrics is not None:
                metrics.write(_metrics_line(info))
            callbacks.on_step(info)
            if training.compiled is not None and (line := training.compiled.news()):
                callbacks.on_notice(line)
            nonfinite.watch(info, training.skips, recipe.max_skipped, training.run, tell=ranks.first)
            last = training.step == recipe.steps
            snapshots = recipe.save.averages_every if ranks.first and recipe.ema else None
            if snapshots and training.step % snapshots == 0:
                saving.write_snapshot(
                    training
                )  # before the checkpoint: a run resumed from that does not come here again
            if last or training.step % recipe.save.every == 0:
                saved = saving.save(training, metrics, callbacks)
            watched = last or stop.signum is None
            if watched and training.held_out is not None and run_state.measure_due(recipe, training.step):
                _measure(training, training.held_out, callbacks)
            if watched and run_state.sample_due(recipe, training.step):
                _sample(training, callbacks)
        if training.step > (saved.step if saved else 0):
            saved = saving.save(training, metrics, callbacks)
        if saved is None or training.step < recipe.steps:
            raise Interrupted(signum, training.step, training.run)
    return saved


def _metrics(training: Training) -> contextlib.AbstractContextManager[checkpoint.Metrics | None]:
    if not training.ranks.first:
        return contextlib.nullcontext()
    return checkpoint.Metrics(training.run, training.step)


def _measure(training: Training, held_out: HeldOut, callbacks: Callbacks) -> None:
    recipe = training.recipe
    training.forget_gradient()
    told = f"held-out pictures after step {training.step}"
    told_of = memory.explained(told, recipe, memory.measuring(recipe))
    with told_of, uncompiled(training.compiled), training.without_beside():
        callbacks.on_measure(training.step, training.transformer, held_out)


def _sample(training: Training, callbacks: Callbacks) -> None:
    recipe = training.recipe
    training.forget_gradient()
    told = f"samples after step {training.step}"
    shown = contextlib.nullcontext() if recipe.samples.with_training_adapter else training.without_beside()
    with memory.explained(told, recipe, memory.drawing(recipe)), uncompiled(training.compiled), shown:
        callbacks.on_sample(training.step, training.transformer)


def _metrics_line(info: StepInfo) -> dict[str, Any]:
    asked: dict[str, Any] = {} if info.group_norms is None else {"gradient_norms": info.group_norms}
    if info.regularisation_loss is not None:
        asked["regularisation_loss"] = info.regularisation_loss
    asked |= {**(info.adversary or {}), **(info.parts or {})}
    return {
        "step": info.step,
        "epoch": info.epoch,
        "loss": info.loss,
        "gradient_norm": info.gradient_norm,
        "learning_rate": info.learning_rate,
        "pictures_per_second": round(info.pictures_per_second, 4),
        "sigma_mean": info.sigma_means,
        **asked,
        **({"skipped": info.at_fault} if info.at_fault else {}),
    }


def open_for_training(
    recipe: Recipe,
    run: Path,
    newest: Checkpoint | None,
    callbacks: Callbacks,
    ranks: Ranks,
    device: str,
    fork: bool = False,
) -> Training:
    """Base, adapter, data and optimizer, as they were after `newest`, or as they are at the start."""
    if recipe.optimizer.kind == "adamw_8bit":
        require_8bit()
    require_compiler(recipe, device)
    source = open_model(recipe.model)
    memory_plan.check(recipe, source, device)
    resolved = plan_layers(recipe, source).layers  # first: a misspelt pattern should not cost an hour of preparing
    beside = training_adapter.opened(recipe, newest, callbacks)
    model_hash = None if beside is None else _hash(source, callbacks)
    if beside is not None and model_hash is not None:
        beside.check_base(recipe.model, model_hash, source.facts.lineage)
    with memory.explained("preparing", recipe, memory.preparing(recipe)):
        batches, held_out = _prepared(recipe, source, callbacks, ranks, device)
    planned = memory_plan.plan_memory(recipe, source, device, ranks, callbacks)  # when the encoders have gone
    with callbacks.stage("reading the base model"):
        dtype, quantise = BASE_DTYPES[recipe.base], recipe.base in INT8_BASES
        names = waiting_names(source.config, planned.waiting)
        transformer = source.load_transformer(dtype=dtype, quantise=quantise, device=device, waiting=names)
        if recipe.base == "w8a8":
            quantise_activations(transformer, kind_for(device))
    check_attention(transformer, batches, device, callbacks)
    if planned.kept is not None:
        blocks = blocks_of(transformer)
        numerics.enable_checkpointing(transformer, [blocks[index] for index in spread(planned.kept, len(blocks))])
    dtype = parameter_dtype(recipe.optimizer)
    with callbacks.stage("making the adapter's first values"):
        adapter = plan.build(recipe.adapter, transformer, resolved, dtype=dtype, seed=recipe.seed, device=device)
    beside_on = None if beside is None else beside.put_on(transformer, adapter, device)
    if planned.waiting:
        with callbacks.stage(f"pinning {planned.waiting} blocks of the base in RAM"):
            BlockOffload(transformer, planned.waiting, device)
    training = Training(
        recipe=recipe,
        run=run,
        transformer=transformer,
        source=source,
        facts=training_adapter.result_facts(source.facts, recipe),
        resolved=resolved,
        adapter=adapter,
        optimizer=make_optimizer(recipe.optimizer, adapter.named_parameters(), recipe.seed),
        averages=ema.Averages(saving.averaged(adapter), recipe.ema if ranks.first else (), recipe.ema_every),
        ranks=ranks,
        batches=batches,
        device=device,
        held_out=held_out,
        identity={
            "model_hash": model_hash or _hash(source, callbacks),
            "data_hash": batches.fingerprint(),
            **({} if beside is None else {training_adapter.STATE: beside.file.sha256}),
        },
        compiled=compiled_blocks(recipe, transformer, device, newest, callbacks),
        adversary=adversary.adversary_of(recipe, transformer, device),
        beside=beside,
        beside_on=beside_on,
    )
    if newest is not None:
        with callbacks.stage(f"reading the checkpoint of step {newest.step}"):
            saving.restore(training, newest, fork)
    else:
        with callbacks.stage("measuring the adapter's norms"):
            training.start_norm = plan.start_norm(recipe.adapter, adapter)
    return training


def _hash(source: ModelSource, callbacks: Callbacks) -> str:
    with callbacks.stage("hashing the base model's files"):
        return source.hash


def _prepared(
    recipe: Recipe, source: ModelSource, callbacks: Callbacks, ranks: Ranks, device: str
) -> tuple[Batches, HeldOut | None]:
    """The data, encoded: each process encodes a part, then each reads all."""
    if ranks.world > 1:
        prepare_cache(recipe, source, device=device, part=(ranks.rank, ranks.world), progress=callbacks.on_prepare)
        ranks.meet()  # else the first rank, looking through all, would encode again what slower ones still encode
    return ranks.in_turn(
        lambda: prepare_recipe(recipe, source, device=device, progress=callbacks.on_prepare, told=callbacks.on_data),
        lambda: prepare_recipe(recipe, source, device=device),
    )


def check_attention(transformer: FluxTransformer2DModel, batches: Batches, device: str, callbacks: Callbacks) -> None:
    """On CUDA, where kernels differ by card and version: whether attention's gradients are right at this run's sizes.

    Raises:
        RunError: they are not.
    """
    if not device.startswith("cuda"):
        return
    head_dim, dtype = int(transformer.config.attention_head_dim), transformer.dtype
    lengths = attention.lengths_to_check(*batches.sequence_lengths())
    with callbacks.stage("checking attention's gradients"):
        worst = attention.check_gradients(head_dim=head_dim, dtype=dtype, lengths=lengths, device=device)
    callbacks.on_notice(attention.told(head_dim, dtype, lengths, worst))
