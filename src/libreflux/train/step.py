"""One optimizer step: which pictures, which noise, which loss, which gradient."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux import keyed
from libreflux.adapter.files import Adapter
from libreflux.adapter.targets import Resolved, group
from libreflux.data.batches import Batches
from libreflux.data.held_out import HeldOut
from libreflux.data.order import Unit, padding_share, step_plan, steps_of_epoch
from libreflux.errors import RunError
from libreflux.flow.sigmas import independent, make_law, stratified
from libreflux.model.facts import Facts
from libreflux.recipe import Recipe, SigmaSpec
from libreflux.train.callbacks import Started, StepInfo
from libreflux.train.ema import Averages
from libreflux.train.objective import flow_matching_loss, keyed_noise
from libreflux.train.optimizer import Optimizer, clip_grad_norm, lr_at
from libreflux.train.ranks import Ranks


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
    return draw(law, count, keyed.generator(seed, "sigma", step))


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
    squares: dict[str, float] = {}
    offset = 0
    for name, layer in adapter.layers.items():
        size = sum(parameter.numel() for parameter in layer.delta.parameters())
        part = torch.linalg.vector_norm(gradient[offset : offset + size], dtype=torch.float64)
        squares[group(name)] = squares.get(group(name), 0.0) + float(part) ** 2
        offset += size
    return {name: math.sqrt(square) for name, square in squares.items()}


def require_finite(losses: Sequence[float], sample_ids: Sequence[str], step: int) -> None:
    """Raises RunError naming the pictures whose loss is not finite."""
    bad = [sample for sample, loss in zip(sample_ids, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        mend = "look at these pictures and captions, or lower optimizer.learning_rate"
        raise RunError(f"the loss of picture {', '.join(bad)} is not finite", where=f"step {step + 1}", mend=mend)


@dataclass
class Training:
    """A run in memory. `step` counts finished optimizer steps.

    Attributes:
        identity: hashes of what a resumed run must find unchanged.
        start_norm: ||delta|| / ||W|| of the adapter before the first step; None in a resumed run.
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
    held_out: HeldOut | None = None

    def started(self) -> Started:
        recipe, samples = self.recipe, self.batches.samples
        return Started(
            run=self.run,
            step=self.step,
            steps=self.recipe.steps,
            pictures=len(self.batches),
            epoch_steps=steps_of_epoch(0, samples, self.ranks.world, recipe.batch, recipe.accumulate),
            padding_share=padding_share(recipe.seed, 0, samples, recipe.batch),
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
            mend = "run all processes on the same kind of device and the same versions"
            raise RunError(f"the adapters of the processes differ after step {self.step}", where=self.run, mend=mend)

    def take_step(self) -> StepInfo:
        """One optimizer step: accumulate × batch pictures (fewer at an epoch's end), each by its `loss_weight`."""
        recipe, step, begun = self.recipe, self.step, time.perf_counter()
        world, rank = self.ranks.world, self.ranks.rank
        units = step_plan(recipe.seed, step, self.batches.samples, world, recipe.batch, recipe.accumulate)
        sigmas = draw_sigmas(recipe.sigmas, units[0].total, recipe.seed, step)
        parameters = list(self.adapter.parameters())
        gradient = torch.zeros(sum(parameter.numel() for parameter in parameters), device=self.device)
        own: list[tuple[int, str, float]] = []
        for unit in units:
            if unit.items and unit.rank == rank:
                ids, of_unit = self._backward(unit, sigmas)
                accumulate_gradient(gradient, parameters)
                own += zip(unit.slots, ids, of_unit.tolist(), strict=True)
        self.ranks.sum_(gradient)
        rows = sorted(row for part in self.ranks.gather(own) for row in part)
        sample_ids, losses = [sample for _, sample, _ in rows], [loss for _, _, loss in rows]
        require_finite(losses, sample_ids, step)
        norms = group_norms(gradient, self.adapter) if recipe.gradient_norms else None
        try:
            norm = clip_grad_norm(gradient, recipe.optimizer.clip)
        except RunError as error:
            raise RunError(
                error.what, where=f"step {step + 1}, pictures {', '.join(sample_ids)}", mend=error.mend
            ) from None
        learning_rate = lr_at(
            step,
            learning_rate=recipe.optimizer.learning_rate,
            steps=recipe.steps,
            warmup=recipe.optimizer.warmup,
            schedule=recipe.optimizer.schedule,
        )
        self.optimizer.step(learning_rate, gradient)
        self.step += 1
        self.averages.update(self.step)
        return StepInfo(
            step=self.step,
            steps=recipe.steps,
            epoch=units[0].epoch,
            loss=math.fsum(losses) / len(losses),
            gradient_norm=norm,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - begun,
            sample_ids=sample_ids,
            sigmas=sigmas.tolist(),
            losses=losses,
            group_norms=norms,
        )

    def _backward(self, unit: Unit, sigmas: Tensor) -> tuple[Sequence[str], Tensor]:
        """Leaves the unit's share of the step's gradient in the parameters; returns sample ids and losses [B]."""
        batch, seed = self.batches.batch(unit), self.recipe.seed
        named = zip(batch.sample_ids, unit.slots, strict=True)
        noise = torch.stack([keyed_noise(batch.latents.shape[1:], seed, name, self.step, slot) for name, slot in named])
        losses = flow_matching_loss(
            self.transformer,
            batch.latents.to(self.device),
            noise.to(self.device),
            sigmas[list(unit.slots)].to(self.device),
            batch.text.to(self.device),
            guidance=self.recipe.guidance,
        )
        (losses @ batch.loss_weights.to(self.device) / unit.total).backward()
        return batch.sample_ids, losses.detach()
