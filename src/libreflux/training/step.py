"""One optimizer step: which pictures, which noise, which loss, which gradient."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux import seeding
from libreflux.adapter.adapter import Adapter
from libreflux.adapter.targets import Resolved
from libreflux.data.batches import Batch, Batches
from libreflux.data.held_out import HeldOut
from libreflux.data.order import Unit, step_plan, steps_of_epoch
from libreflux.errors import RunError
from libreflux.flow.sigmas import independent, make_law, stratified
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.facts import Facts
from libreflux.model.source import ModelSource
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.training import flow_objective
from libreflux.training.adversary import Adversary, draw_rungs, renoise_sigmas, told_means
from libreflux.training.callbacks import Started, StepInfo
from libreflux.training.ema import Averages
from libreflux.training.gradient import accumulate_gradient, clip_grad_norm, group_norms
from libreflux.training.nonfinite import Skips, at_fault, heads_at_fault, require_finite
from libreflux.training.objective import (
    Learned,
    NoisedBatch,
    distilled_target,
    keyed_noise,
    on_rungs,
    regularised_target,
)
from libreflux.training.optimizer import Optimizer, lr_at
from libreflux.training.ranks import Ranks, sigma_means
from libreflux.training.training_adapter import TrainingAdapter, losses, sample_facts, together

_Row = tuple[int, str, float, bool, Sequence[float]]
"""Of one picture: slot, sample id, loss, whether its source is for regularisation, and the parts of the loss."""


def draw_sigmas(spec: SigmaSpec, count: int, seed: int, step: int) -> Tensor:
    """The noise levels of one step, [count] fp32 in slot order: a function of (seed, "sigma", step).

    Args:
        spec: the recipe's law.
        count: pictures of the step over all ranks and accumulated passes; fewer at an epoch's short end.
        seed: the recipe's.
        step: from 0.
    """
    law = make_law(spec.law, shift=spec.shift, uniform_floor=spec.uniform_floor, **spec.params)
    draw = stratified if spec.stratified else independent
    return draw(law, count, seeding.generator(seed, "sigma", step))


@dataclass
class Training:
    """A run in memory. `step` counts finished optimizer steps.

    Attributes:
        source: the base model.
        identity: hashes of what a resumed run must find unchanged.
        start_norm: ||delta|| / ||W|| of the adapter before the first step; None in a resumed run.
        skips: the steps that were skipped.
        forks: the changes of the recipe so far, see `training.forks`.
        compiled: the transformer's blocks; None where they are not.
        adversary: of a student that learns from one.
        beside: the training adapter, of which nothing is saved; None without one.
        beside_on: the same on the transformer.
    """

    recipe: Recipe
    run: Path
    source: ModelSource
    transformer: FluxTransformer2DModel
    facts: Facts
    resolved: Sequence[Resolved]
    adapter: Adapter
    optimizer: Optimizer
    averages: Averages
    batches: Batches
    device: str
    identity: dict[str, str]
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    start_norm: float | None = None
    skips: Skips = field(default_factory=Skips)
    forks: Sequence[dict[str, Any]] = ()
    held_out: HeldOut | None = None
    compiled: CompiledBlocks | None = None
    adversary: Adversary | None = None
    beside: TrainingAdapter | None = None
    beside_on: Adapter | None = None
    _gradient: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def shift(self) -> float:
        """Of a student's ladder; what has no fixed one is refused as a student before training."""
        return 1.0 if self.facts.shift is None else self.facts.shift

    @property
    def all_on(self) -> Adapter:
        """All that is on the base, as one adapter to switch off: what is left is the base alone."""
        return together(self.adapter, self.beside_on)

    def without_beside(self) -> AbstractContextManager[None]:
        """The model as its result is used: the training adapter is off while the block runs."""
        return nullcontext() if self.beside_on is None else self.beside_on.disabled()

    def started(self) -> Started:
        recipe, samples = self.recipe, self.batches.samples
        epoch = samples.next_shown(0)
        return Started(
            run=self.run,
            step=self.step,
            steps=self.recipe.steps,
            pictures=len(self.batches),
            epoch_steps=steps_of_epoch(epoch, samples, self.ranks.world, recipe.batch, recipe.accumulate),
            source=self.source,
            facts=self.facts,
            sample_facts=sample_facts(self.source.facts, recipe),
            resolved=self.resolved,
            start_norm=self.start_norm,
            held_out=self.held_out,
        )

    def require_replicas(self) -> None:
        """Raises RunError unless all ranks hold the same adapter, and heads of an adversary, to the byte."""
        digest = hashlib.sha256()
        for parameter in self.adapter.parameters() if self.ranks.world > 1 else ():
            digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
        heads = "" if self.adversary is None or self.ranks.world == 1 else self.adversary.digest()
        digests = self.ranks.gather([digest.hexdigest(), heads])
        for what, one in zip(("adapters", "adversary's heads"), zip(*digests, strict=True), strict=True):
            if len(set(one)) > 1:
                hint = "run all processes on the same kind of device and the same versions"
                raise RunError(f"the {what} of the processes differ after step {self.step}", where=self.run, hint=hint)

    def take_step(self) -> StepInfo:
        """One optimizer step: accumulate × batch pictures (fewer at an epoch's end), each by its `loss_weight`.

        With a loss or gradient that is not finite it is skipped: counted, and neither weights nor optimizer move.

        Raises:
            RunError: the step made weights that are not finite.
        """
        recipe, step, begun = self.recipe, self.step, time.perf_counter()
        units = step_plan(recipe.seed, step, self.batches.samples, self.ranks.world, recipe.batch, recipe.accumulate)
        sigmas = self._sigmas(units[0].total)
        parameters = list(self.adapter.parameters())
        gradient = self._zero_gradient()
        pictures: list[tuple[int, str, bool]] = []
        learned: list[Learned] = []
        for unit in units:
            if not unit.items or unit.rank != self.ranks.rank:
                continue
            batch = self.batches.batch(unit)
            noised = self._noised(batch, unit, sigmas)
            learned.append(self._learn(batch, unit, noised))
            accumulate_gradient(gradient, parameters)
            pictures += zip(unit.slots, batch.sample_ids, batch.regularised, strict=True)
        # A slow rank is waited for in words, so that all begin the sum at once and it can have a strict time-out.
        rows = sorted(row for part in self.ranks.gather(_rows(pictures, learned)) for row in part)
        self.ranks.sum_(gradient)
        if self.adversary is not None:
            self.ranks.sum_(self.adversary.gradient)
        moved = self._move(gradient, rows)
        return self._info(units, sigmas, rows, moved, time.perf_counter() - begun)

    def forget_gradient(self) -> None:
        """Gives the memory of the gradient back, for what comes between two steps."""
        self._gradient = None

    def _zero_gradient(self) -> Tensor:
        """[P] fp32 zeros, in the same memory at each step: new memory costs more than zeros."""
        if self._gradient is None:
            count = sum(one.numel() for one in self.adapter.parameters())
            self._gradient = torch.empty(count, dtype=torch.float32, device=self.device)
        if self.adversary is not None:
            self.adversary.forget()
        return self._gradient.zero_()

    def _sigmas(self, count: int) -> Tensor:
        """The step's noise levels, [count] by slot; of a student of few steps, rungs of its ladder."""
        recipe, distil = self.recipe, self.recipe.distil
        if distil is not None and distil.adversarial is not None and distil.steps is not None:
            return draw_rungs(distil.adversarial, distil.steps, count, recipe.seed, self.step, shift=self.shift)
        sigmas = draw_sigmas(recipe.sigmas, count, recipe.seed, self.step)
        if distil is None or distil.steps is None:
            return sigmas
        return on_rungs(sigmas, distil.steps, self.shift)

    def _noise(self, batch: Batch, unit: Unit, *purpose: str) -> Tensor:
        """[B, C, h, w] on the device, of the pictures' slots."""
        shape, seed = batch.latents.shape[1:], self.recipe.seed
        named = zip(batch.sample_ids, unit.slots, strict=True)
        noise = torch.stack([keyed_noise(shape, seed, name, self.step, slot, *purpose) for name, slot in named])
        return noise.to(self.device)

    def _noised(self, batch: Batch, unit: Unit, sigmas: Tensor) -> NoisedBatch:
        """A unit's pictures on the device, with the noise of their slots; `sigmas` [count] are the step's, by slot."""
        return NoisedBatch(
            latents=batch.latents.to(self.device),
            noise=self._noise(batch, unit),
            sigma=sigmas[list(unit.slots)].to(self.device),
            text=batch.text.to(self.device),
            guidance=self.recipe.guidance,
        )

    def _learn(self, batch: Batch, unit: Unit, noised: NoisedBatch) -> Learned:
        """One forward and backward pass, or those with an adversary: gradients are left with the parameters."""
        weights, adversary, seed = batch.loss_weights.to(self.device), self.adversary, self.recipe.seed
        if adversary is None and (keys := flow_objective.flow_keys(self.recipe)) is not None:
            return self._learn_by_flow_keys(keys, batch, unit, noised)
        if adversary is None:
            target = self._target(batch, noised)
            of_unit = losses(self.transformer, self.beside_on, noised, batch.regularised, target)
            (of_unit @ weights / unit.total).backward()
            return Learned(of_unit.detach(), {})
        levels = renoise_sigmas(adversary.spec, unit.total, seed, self.step)[list(unit.slots)]
        again = replace(noised, noise=self._noise(batch, unit, "adversary"), sigma=levels.to(self.device))
        compiled = self.compiled is not None
        return adversary.learn(self.transformer, self.all_on, noised, again, weights / unit.total, compiled=compiled)

    def _learn_by_flow_keys(
        self, keys: flow_objective.FlowKeys, batch: Batch, unit: Unit, noised: NoisedBatch
    ) -> Learned:
        """`_learn` under the recipe's `guided_target` and `hold_base`."""
        # The noise levels are drawn again: to ask for those of `noised` would wait for the device.
        roles = flow_objective.Roles.of(keys, batch, self._sigmas(unit.total)[list(unit.slots)].tolist())
        weights, empty = batch.loss_weights.to(self.device) / unit.total, self.batches.empty_prompt().to(self.device)
        on, beside = (self.transformer, self.all_on), self.beside_on
        return flow_objective.learn(*on, noised, weights, keys=keys, roles=roles, empty=empty, beside=beside)

    def _target(self, batch: Batch, noised: NoisedBatch) -> Tensor:
        """What the network's velocity is compared with, by the recipe's objective; [B, h*w/4, 4C] fp32."""
        if self.recipe.distil is None:
            return regularised_target(self.transformer, self.all_on, noised, batch.regularised)
        empty = self.batches.empty_prompt().to(self.device)
        return distilled_target(self.transformer, self.all_on, noised, empty, self.recipe.distil, shift=self.shift)

    def _move(self, gradient: Tensor, rows: Sequence[_Row]) -> _Moved:
        """Clips the step's gradient [P] and moves the weights along it, unless it or a loss is not finite.

        An adversary's heads move with them, or neither does.
        """
        spec, adversary, sample_ids = self.recipe.optimizer, self.adversary, [row[1] for row in rows]
        norms = group_norms(gradient, self.adapter) if self.recipe.gradient_norms else None
        norm = clip_grad_norm(gradient, spec.clip)
        faulty = at_fault(sample_ids, [row[2] for row in rows], norm, spec.clip)
        heads_norm = None if adversary is None else adversary.norm()
        if heads_norm is not None and not faulty:
            faulty = heads_at_fault(sample_ids, [discriminator for *_, (discriminator, *_) in rows], heads_norm)
        learning_rate = lr_at(
            self.step,
            learning_rate=spec.learning_rate,
            steps=self.recipe.steps,
            warmup=spec.warmup,
            schedule=spec.schedule,
        )
        self.skips.count(bool(faulty))
        if not faulty:
            self.averages.before_change()
            self.optimizer.step(learning_rate, gradient)
            require_finite(self.adapter.parameters(), self.step + 1, self.run)
            if adversary is not None:
                adversary.move(self.step + 1, self.run)
        self.step += 1
        self.averages.update(self.step)  # after a skipped step too: the averages' time is the number of the step
        if faulty:
            return _Moved(learning_rate, None, None, None, faulty)
        return _Moved(learning_rate, norm, norms, heads_norm, faulty)

    def _info(
        self, units: Sequence[Unit], sigmas: Tensor, rows: Sequence[_Row], moved: _Moved, seconds: float
    ) -> StepInfo:
        told = [] if moved.at_fault else rows
        return StepInfo(
            step=self.step,
            steps=self.recipe.steps,
            epoch=units[0].epoch,
            loss=_mean([loss for _, _, loss, regularised, _ in told if not regularised]),
            regularisation_loss=_mean([loss for _, _, loss, regularised, _ in told if regularised]),
            adversary=_adversary_told(told, sigmas, moved.heads_norm),
            parts=_parts_told(told, self.recipe),
            gradient_norm=moved.norm,
            learning_rate=moved.learning_rate,
            seconds=seconds,
            sample_ids=[row[1] for row in rows],
            sigmas=sigmas.tolist(),
            losses=[row[2] for row in rows],
            sigma_means=sigma_means(units, sigmas, self.ranks.world),
            group_norms=moved.group_norms,
            at_fault=moved.at_fault,
            skipped=self.skips.total,
        )


@dataclass(frozen=True)
class _Moved:
    """What `Training._move` did; norms are None, and `at_fault` names pictures, if it did nothing."""

    learning_rate: float
    norm: float | None
    group_norms: dict[str, float] | None
    heads_norm: float | None
    at_fault: Sequence[str]


def _rows(pictures: Sequence[tuple[int, str, bool]], learned: Sequence[Learned]) -> list[_Row]:
    """A row for each of one process's pictures; `learned` is of each pass."""
    # The passes' one wait for the device.
    table = torch.cat([one.table() for one in learned]).tolist() if learned else []
    return [
        (slot, name, loss, regularised, told)
        for (slot, name, regularised), (loss, *told) in zip(pictures, table, strict=True)
    ]


def _adversary_told(rows: Sequence[_Row], sigmas: Tensor, heads_norm: float | None) -> dict[str, float] | None:
    """Means over pictures; None without an adversary, and for a skipped step; `sigmas` [count] by slot."""
    if heads_norm is None:
        return None
    means = told_means([row[4] for row in rows], [float(sigmas[row[0]]) for row in rows])
    return {**means, "heads_gradient_norm": heads_norm}


def _parts_told(rows: Sequence[_Row], recipe: Recipe) -> dict[str, float] | None:
    """Means over the trained pictures; None under plain flow matching, and in a step without such pictures."""
    keys = flow_objective.flow_keys(recipe)
    trained = [told for _, _, _, regularised, told in rows if not regularised]
    return flow_objective.told_parts(trained, keys) if keys is not None and trained else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
