"""One optimizer step: which pictures, which noise, which loss, which gradient."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux import seeding
from libreflux.adapter.adapter import Adapter
from libreflux.adapter.targets import Resolved, group
from libreflux.data.batches import Batch, Batches
from libreflux.data.held_out import HeldOut
from libreflux.data.order import Unit, step_plan, steps_of_epoch
from libreflux.errors import RunError
from libreflux.flow.sigmas import independent, make_law, stratified
from libreflux.model.device import with_fp64
from libreflux.model.facts import Facts
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.training.callbacks import Started, StepInfo
from libreflux.training.ema import Averages
from libreflux.training.nonfinite import Skips, at_fault, require_finite
from libreflux.training.objective import (
    NoisedBatch,
    distilled_target,
    flow_matching_loss,
    keyed_noise,
    on_rungs,
    regularised_target,
)
from libreflux.training.optimizer import Optimizer, clip_grad_norm, lr_at
from libreflux.training.ranks import Ranks

_Row = tuple[int, str, float, bool]
"""Of one picture: slot, sample id, loss, whether its source is for regularisation."""


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


def accumulate_gradient(total: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Adds the parameters' gradients to a flat fp32 vector [P], in their order, and forgets them.

    In fp32 whatever the parameters' dtype: eight passes summed in bf16 would each be rounded to 8 bits.
    """
    offset = 0
    for parameter in parameters:
        if parameter.grad is not None:
            total[offset : offset + parameter.numel()] += parameter.grad.reshape(-1)
            parameter.grad = None
        offset += parameter.numel()


def group_norms(gradient: Tensor, adapter: Adapter) -> dict[str, float]:
    """The norm of a flat gradient [P], in the adapter's order, by layer; like layers of all blocks are one group."""
    sizes = [sum(parameter.numel() for parameter in layer.delta.parameters()) for layer in adapter.layers.values()]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in with_fp64(gradient).split(sizes)]
    squares: dict[str, float] = {}
    for name, norm in zip(adapter.layers, torch.stack(norms).tolist(), strict=True):  # one wait for the device
        squares[group(name)] = squares.get(group(name), 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


def sigma_means(units: Sequence[Unit], sigmas: Tensor, world: int) -> list[float | None]:
    """Mean noise level of each rank's pictures in one step; None for a rank that has none.

    Args:
        units: the step's, of all ranks.
        sigmas: [count] fp32, by slot.
        world: number of ranks.
    """
    by_rank: list[list[int]] = [[] for _ in range(world)]
    for unit in units:
        by_rank[unit.rank] += unit.slots
    return [float(sigmas[slots].double().mean()) if slots else None for slots in by_rank]


@dataclass
class Training:
    """A run in memory. `step` counts finished optimizer steps.

    Attributes:
        identity: hashes of what a resumed run must find unchanged.
        start_norm: ||delta|| / ||W|| of the adapter before the first step; None in a resumed run.
        skips: the steps that were skipped.
        forks: the changes of the recipe so far, see `training.forks`.
    """

    recipe: Recipe
    run: Path
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

    @property
    def shift(self) -> float:
        """Of a student's ladder; what has no fixed one is refused as a student before training."""
        return 1.0 if self.facts.shift is None else self.facts.shift

    def started(self) -> Started:
        recipe, samples = self.recipe, self.batches.samples
        epoch = samples.next_shown(0)
        return Started(
            run=self.run,
            step=self.step,
            steps=self.recipe.steps,
            pictures=len(self.batches),
            epoch_steps=steps_of_epoch(epoch, samples, self.ranks.world, recipe.batch, recipe.accumulate),
            facts=self.facts,
            resolved=self.resolved,
            start_norm=self.start_norm,
            held_out=self.held_out,
        )

    def require_replicas(self) -> None:
        """Raises RunError unless all ranks hold the same adapter, to the byte."""
        digest = hashlib.sha256()
        for parameter in self.adapter.parameters() if self.ranks.world > 1 else ():
            digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
        digests = self.ranks.gather(digest.hexdigest())
        if len(set(digests)) > 1:
            hint = "run all processes on the same kind of device and the same versions"
            raise RunError(f"the adapters of the processes differ after step {self.step}", where=self.run, hint=hint)

    def take_step(self) -> StepInfo:
        """One optimizer step: accumulate × batch pictures (fewer at an epoch's end), each by its `loss_weight`.

        With a loss or gradient that is not finite it is skipped: counted, and neither weights nor optimizer move.

        Raises:
            RunError: the step made weights that are not finite.
        """
        recipe, step, begun = self.recipe, self.step, time.perf_counter()
        world, rank = self.ranks.world, self.ranks.rank
        units = step_plan(recipe.seed, step, self.batches.samples, world, recipe.batch, recipe.accumulate)
        sigmas = draw_sigmas(recipe.sigmas, units[0].total, recipe.seed, step)
        if recipe.distil is not None and recipe.distil.steps is not None:
            sigmas = on_rungs(sigmas, recipe.distil.steps, self.shift)
        gradient = torch.zeros(sum(p.numel() for p in self.adapter.parameters()), device=self.device)
        own = self._accumulate([unit for unit in units if unit.items and unit.rank == rank], sigmas, gradient)
        # A slow rank is waited for in words, so that all begin the sum at once and it can have a strict time-out.
        rows = sorted(row for part in self.ranks.gather(own) for row in part)
        self.ranks.sum_(gradient)
        sample_ids, losses = [row[1] for row in rows], [row[2] for row in rows]
        norms = group_norms(gradient, self.adapter) if recipe.gradient_norms else None
        norm = clip_grad_norm(gradient, recipe.optimizer.clip)
        faulty = at_fault(sample_ids, losses, norm, recipe.optimizer.clip)
        learning_rate = self._update(gradient, skip=bool(faulty))
        told = [] if faulty else rows
        return StepInfo(
            step=self.step,
            steps=recipe.steps,
            epoch=units[0].epoch,
            loss=_mean([loss for _, _, loss, regularised in told if not regularised]),
            regularisation_loss=_mean([loss for _, _, loss, regularised in told if regularised]),
            gradient_norm=None if faulty else norm,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - begun,
            sample_ids=sample_ids,
            sigmas=sigmas.tolist(),
            losses=losses,
            sigma_means=sigma_means(units, sigmas, world),
            group_norms=None if faulty else norms,
            at_fault=faulty,
            skipped=self.skips.total,
        )

    def _accumulate(self, units: Sequence[Unit], sigmas: Tensor, gradient: Tensor) -> list[_Row]:
        """Adds the units' gradients to a flat one [P]; returns a row for each of their pictures."""
        parameters, losses = list(self.adapter.parameters()), []
        named: list[tuple[int, str, bool]] = []
        for unit in units:
            batch, of_unit = self._backward(unit, sigmas)
            accumulate_gradient(gradient, parameters)
            named += zip(unit.slots, batch.sample_ids, batch.regularised, strict=True)
            losses.append(of_unit)
        on_host = torch.cat(losses).tolist() if losses else []  # the passes' one wait for the device
        return [(slot, name, loss, regularised) for (slot, name, regularised), loss in zip(named, on_host, strict=True)]

    def _update(self, gradient: Tensor, *, skip: bool) -> float:
        """Moves the weights along a clipped gradient, unless it is to be skipped; returns the learning rate."""
        spec = self.recipe.optimizer
        learning_rate = lr_at(
            self.step,
            learning_rate=spec.learning_rate,
            steps=self.recipe.steps,
            warmup=spec.warmup,
            schedule=spec.schedule,
        )
        self.skips.count(skip)
        if not skip:
            self.averages.before_change()
            self.optimizer.step(learning_rate, gradient)
            require_finite(self.adapter.parameters(), self.step + 1, self.run)
        self.step += 1
        self.averages.update(self.step)  # after a skipped step too: the averages' time is the number of the step
        return learning_rate

    def _backward(self, unit: Unit, sigmas: Tensor) -> tuple[Batch, Tensor]:
        """Leaves the unit's share of the step's gradient in the parameters; returns its batch and losses [B]."""
        batch, seed = self.batches.batch(unit), self.recipe.seed
        named = zip(batch.sample_ids, unit.slots, strict=True)
        noise = torch.stack([keyed_noise(batch.latents.shape[1:], seed, name, self.step, slot) for name, slot in named])
        device, distil, net, adapter = self.device, self.recipe.distil, self.transformer, self.adapter
        noised = NoisedBatch(
            latents=batch.latents.to(device),
            noise=noise.to(device),
            sigma=sigmas[list(unit.slots)].to(device),
            text=batch.text.to(device),
            guidance=self.recipe.guidance,
        )
        if distil is None:
            target = regularised_target(net, adapter, noised, batch.regularised)
        else:
            empty = self.batches.empty_prompt().to(device)
            target = distilled_target(net, adapter, noised, empty, distil, shift=self.shift)
        losses = flow_matching_loss(net, noised, target=target)
        (losses @ batch.loss_weights.to(self.device) / unit.total).backward()
        return batch, losses.detach()


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
