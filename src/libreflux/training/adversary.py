"""The adversary of a student: the heads, their optimizer, and what both learn from the pictures of one pass.

One step, by Sauer et al. 2024 (arXiv 2403.12015). The student draws x̂0 in one pass from a rung of its ladder. Real x0
and drawn x̂0 are noised again, by the same noise at the same level, and go through the frozen teacher, which is the base
with the adapter off. The heads learn to tell its features of the two apart; the student learns, through the teacher, to
be taken for real. Both are moved at the end of the step, from what they were at its beginning.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux import seeding
from libreflux.adapter.adapter import Adapter
from libreflux.errors import RunError
from libreflux.flow.path import interpolate, x0_from_velocity
from libreflux.flow.schedule import ladder
from libreflux.flow.sigmas import LogitNormal, Weighted, stratified
from libreflux.model.features import image_features
from libreflux.model.latents import pack
from libreflux.model.offload import spread
from libreflux.recipe import AdversarialSpec, Recipe
from libreflux.training.adversary_heads import (
    Heads,
    adversarial_loss,
    condition,
    drawn_hinge,
    feature_penalty,
    real_hinge,
    standardised,
)
from libreflux.training.gradient import accumulate_gradient, clip_grad_norm
from libreflux.training.nonfinite import require_finite
from libreflux.training.objective import Learned, NoisedBatch
from libreflux.training.optimizer import AdamWFP32

BETAS = (0.0, 0.99)
"""Of the heads' AdamW: no momentum, against an opponent that moves."""
BLOCKS = 5
"""Heads, where the recipe names no blocks."""

ON_HELD_OUT = (
    "held-out pictures are measured by plain flow matching, which an adversary does not lower: "
    "expect it to rise, and look at the samples"
)
"""For a user who measures a student."""

TOLD = ("discriminator_loss", "adversarial_loss", "reconstruction_loss", "penalty", "spread_ratio")
"""Names of the numbers that are told of each picture, in the order of `Learned.told`: the heads' own loss with its
penalty; the student's; plain flow matching; the penalty before its weight; the standard deviation of x̂0 over that of
x0, 1 being right."""
ON_NOISE = ("adversarial_loss", "spread_ratio")
"""Of these, what is told of a student's first step alone too: the later ones begin at noised data, and come near it."""


def chosen_blocks(spec: AdversarialSpec, count: int) -> tuple[int, ...]:
    """The blocks that heads look behind, of a transformer of `count`."""
    return spec.blocks or tuple(spread(min(BLOCKS, count), count))


def renoise_sigmas(spec: AdversarialSpec, count: int, seed: int, step: int) -> Tensor:
    """The levels at which the heads see a step's pictures, [count] fp32 by slot: of (seed, "adversary", step)."""
    law = LogitNormal(mean=spec.noise_mean, std=spec.noise_std)
    return stratified(law, count, seeding.generator(seed, "adversary", step))


def rung_weights(spec: AdversarialSpec, steps: int) -> tuple[float, ...]:
    """How often each step of a student is drawn, from the noisiest on, in proportion."""
    if spec.rungs is not None or steps == 1:
        return spec.rungs or (1.0,)
    # A student's first step decides the layout, and draws from pure noise, which no other step trains.
    return (0.5, *[0.5 / (steps - 1)] * (steps - 1))


def draw_rungs(spec: AdversarialSpec, steps: int, count: int, seed: int, step: int, *, shift: float = 1.0) -> Tensor:
    """The rungs of a student's ladder at which it is trained, [count] fp32 by slot: of (seed, "sigma", step).

    Args:
        spec: the recipe's; `warmup` counts training steps.
        steps: that the student draws in.
        count: pictures of the training step.
        seed: the run's.
        step: of the training, from 0.
        shift: of the ladder.
    """
    law = Weighted(ladder(steps, shift)[:-1].tolist(), rung_weights(spec, steps))
    drawn = stratified(law, count, seeding.generator(seed, "sigma", step))
    return lower_rungs(drawn, steps, shift) if step < spec.warmup else drawn


def lower_rungs(sigma: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Rungs of a ladder, [B], brought into its less noisy half: each to the one of half its number, counted from 0.

    For the first steps of a training: there the student has the layout before it, and only details are to be learned.
    """
    rising = ladder(steps, shift)[:-1].flip(0).to(sigma)
    return rising[torch.searchsorted(rising, sigma) // 2]


class Adversary:
    """Heads with their optimizer and the gradient of a step; `transformer` alone decides their sizes.

    Args:
        spec: the recipe's.
        transformer: the teacher's, which the student's adapter is on.
        seed: the run's.
        device: of the heads.
    """

    def __init__(
        self, spec: AdversarialSpec, transformer: FluxTransformer2DModel, seed: int, device: torch.device | str
    ) -> None:
        config = transformer.config
        self.spec, self.device = spec, torch.device(device)
        self.blocks = chosen_blocks(spec, config.num_layers + config.num_single_layers)
        width = config.num_attention_heads * config.attention_head_dim
        pooled = config.pooled_projection_dim
        self.heads = Heads(self.blocks, features=width, pooled=pooled, width=spec.width, device=device)
        if self.device.type != "meta":
            self.heads.start(seed)
        self.parameters = list(self.heads.parameters())
        self.optimizer = AdamWFP32(self.heads.named_parameters(), betas=BETAS, weight_decay=0.0)
        self.gradient = torch.zeros(self.optimizer.count, device=device)

    def learn(
        self,
        transformer: FluxTransformer2DModel,
        adapter: Adapter,
        batch: NoisedBatch,
        again: NoisedBatch,
        weights: Tensor,
        *,
        compiled: bool = False,
    ) -> Learned:
        """Adds one pass's gradients: the student's to its parameters' `.grad`, the heads' to `gradient`.

        Args:
            transformer: with `adapter` on it.
            adapter: the student's.
            batch: the pictures at rungs of the student's ladder.
            again: the same pictures and prompts, with the noise and the levels at which the heads see them.
            weights: [B], of each picture in the gradient of the step.
            compiled: whether the transformer's blocks are.

        Raises:
            ModelError: a block that the transformer does not have.
        """
        x = batch.x_sigma
        velocity = batch.velocity(transformer, x, batch.sigma)
        drawn_x0 = x0_from_velocity(x, velocity, batch.sigma)
        with adapter.disabled():
            # Heads would find out another rounding. Compiled blocks have a graph of their own, with other last bits,
            # where nothing needs a gradient: real pictures are then given one, which is thrown away.
            x_real = again.x_sigma.requires_grad_(compiled)
            real = {block: seen.detach() for block, seen in self._features(transformer, again, x_real).items()}
            drawn = self._features(transformer, again, interpolate(drawn_x0, pack(again.noise), again.sigma))
        # One pass of the teacher serves both: the heads see its features cut off, the student their gradient by them.
        cut = {block: seen.detach().requires_grad_() for block, seen in drawn.items()}
        told = condition(again.sigma, again.text.pooled)
        height = again.latents.shape[-2] // 2
        of_heads, penalty, adversarial = self._judge(real, cut, height, told)
        by_features = torch.autograd.grad(adversarial @ weights, list(cut.values()), retain_graph=True)
        (of_heads @ weights).backward(inputs=self.parameters)
        accumulate_gradient(self.gradient, self.parameters)
        reconstruction = (velocity - batch.target).square().mean(dim=(1, 2))
        beside = self.spec.reconstruction * (reconstruction @ weights)
        torch.autograd.backward([*drawn.values(), beside], [*by_features, torch.ones_like(beside)])
        spread_ratio = drawn_x0.detach().std(dim=(1, 2)) / batch.latents.std(dim=(1, 2, 3)).clamp(min=1e-6)
        parts = (of_heads.detach(), adversarial.detach(), reconstruction.detach(), penalty.detach(), spread_ratio)
        losses = (adversarial + self.spec.reconstruction * reconstruction).detach()
        return Learned(losses, dict(zip(TOLD, parts, strict=True)))

    def _features(self, transformer: FluxTransformer2DModel, batch: NoisedBatch, x: Tensor) -> dict[int, Tensor]:
        with image_features(transformer, self.blocks) as found:
            batch.velocity(transformer, x, batch.sigma)
        return {block: standardised(found[block]) for block in self.blocks}

    def _judge(
        self, real: Mapping[int, Tensor], drawn: Mapping[int, Tensor], height: int, told: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the heads, penalty in them and losses of the student, each [B], mean over heads."""
        real = {block: seen.requires_grad_() for block, seen in real.items()}
        on_real, on_drawn = self.heads(real, height, told), self.heads(drawn, height, told)
        weighs = self.spec.penalty > 0
        penalty = _mean([feature_penalty(on_real[block], real[block], learned=weighs) for block in self.blocks])
        hinge = _mean([real_hinge(on_real[block]) + drawn_hinge(on_drawn[block]) for block in self.blocks])
        adversarial = _mean([adversarial_loss(on_drawn[block]) for block in self.blocks])
        return hinge + self.spec.penalty * penalty if weighs else hinge, penalty, adversarial

    def forget(self) -> None:
        """The gradient of a step begins at zero."""
        self.gradient.zero_()

    def norm(self) -> float:
        """Of the heads' gradient; nan or inf where some of it is not finite."""
        return clip_grad_norm(self.gradient, None)

    def move(self, step: int, run: Path) -> None:
        """Moves the heads along the step's gradient.

        Raises:
            RunError: that made weights that are not finite; `step` and `run` are named.
        """
        self.optimizer.step(self.spec.learning_rate, self.gradient)
        require_finite(self.parameters, step, run, heads=True)

    def digest(self) -> str:
        """Of the heads' bytes."""
        digest = hashlib.sha256()
        for parameter in self.parameters:
            digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor of the heads, sharing storage with them."""
        return {name: parameter.detach() for name, parameter in self.heads.named_parameters()}

    @torch.no_grad()
    def load(self, heads: Mapping[str, Tensor], moments: Mapping[str, Tensor], where: Path) -> None:
        """Takes back what `state_dict` and the optimizer's `state_dict_tensors` gave, to the bit.

        Raises:
            RunError: they are of heads behind other blocks, or of another width.
        """
        own = self.state_dict()
        if {name: one.shape for name, one in own.items()} != {name: one.shape for name, one in heads.items()}:
            hint = "put distil.adversarial.blocks and width back as they were, or choose another `out`"
            raise RunError("its heads are not those of the recipe", where=where, hint=hint)
        for name, tensor in heads.items():
            own[name].copy_(tensor)
        self.optimizer.load_state_tensors(moments)


def spec_of(recipe: Recipe) -> AdversarialSpec | None:
    """What a recipe says of its adversary; None for one without."""
    return None if recipe.distil is None else recipe.distil.adversarial


def adversary_of(recipe: Recipe, transformer: FluxTransformer2DModel, device: torch.device | str) -> Adversary | None:
    """The adversary of a recipe; None for one without."""
    spec = spec_of(recipe)
    return None if spec is None else Adversary(spec, transformer, recipe.seed, device)


def told_means(rows: Sequence[Sequence[float]], sigmas: Sequence[float]) -> dict[str, float]:
    """Means over a step's pictures by the names of `TOLD`; nothing without pictures.

    Those of `ON_NOISE` over the pictures that were drawn from pure noise alone too, where there are any.

    Args:
        rows: of each picture its numbers, see `Learned.told`.
        sigmas: of each picture.
    """
    noise = [row for row, sigma in zip(rows, sigmas, strict=True) if sigma == 1]
    on_noise = {f"{name}_on_noise": mean for name, mean in _means(noise).items() if name in ON_NOISE}
    return {**_means(rows), **on_noise}


def _means(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    return {name: math.fsum(column) / len(rows) for name, column in zip(TOLD, zip(*rows, strict=True), strict=False)}


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(dim=0)
