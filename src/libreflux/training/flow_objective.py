"""What `objective: flow` minimises under `guided_target` and `hold_base`: formula, passes, and the parts that are told.

Both keep a distilled model's few steps drawing while it is trained. Neither is from a paper; as trainers have them: the
guided target in ai-toolkit and diffusion-pipe, the held base in SimpleTuner. Their own code was not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.adapter.adapter import Adapter
from libreflux.data.batches import Batch
from libreflux.flow.guidance import decayed_scale, guided_target
from libreflux.flow.sigmas import make_law
from libreflux.model.text import TextConditioning
from libreflux.recipe import GuidedTargetSpec, HoldBaseSpec, Recipe
from libreflux.training.objective import Learned, NoisedBatch

HELD = "held"
"""Beside the parts of the loss: 1 for a picture that is held to the base, else 0."""


@dataclass(frozen=True)
class FlowKeys:
    """The keys of a recipe that change plain flow matching.

    Attributes:
        guided: None where the target is the picture's own.
        hold: None where nothing is held.
    """

    guided: GuidedTargetSpec | None = None
    hold: HoldBaseSpec | None = None


def flow_keys(recipe: Recipe) -> FlowKeys | None:
    """Those of a recipe that are not neutral; None where there is none, and training is plain flow matching."""
    guided, hold = recipe.guided_target, recipe.hold_base
    guided = None if guided is None or guided.neutral else guided
    hold = None if hold is None or hold.neutral else hold
    return None if guided is None and hold is None else FlowKeys(guided, hold)


@dataclass(frozen=True)
class Roles:
    """What each of B pictures is in a pass.

    Attributes:
        regularised: its target is the base's velocity alone.
        guided: its target is the guided one: a caption, and no regularisation.
        held: the penalty applies to it: no regularisation, and a noise level within the interval.
    """

    regularised: Sequence[bool]
    guided: Sequence[bool]
    held: Sequence[bool]

    @property
    def compared(self) -> list[int]:
        """Those that are compared with the base."""
        return _where(a or b for a, b in zip(self.regularised, self.held, strict=True))

    @staticmethod
    def of(keys: FlowKeys, batch: Batch, sigmas: Sequence[float]) -> Roles:
        """Of a batch's pictures at these noise levels."""
        trained = [not flag for flag in batch.regularised]
        captioned = [caption != "" for caption in batch.captions]
        guided = [keys.guided is not None and one and also for one, also in zip(trained, captioned, strict=True)]
        hold = keys.hold
        held = [hold is not None and one and hold.applies(at) for one, at in zip(trained, sigmas, strict=True)]
        return Roles(batch.regularised, guided, held)


def learn(
    transformer: FluxTransformer2DModel,
    adapter: Adapter,
    batch: NoisedBatch,
    weights: Tensor,
    *,
    keys: FlowKeys,
    roles: Roles,
    empty: TextConditioning,
    beside: Adapter | None = None,
) -> Learned:
    """One pass of flow matching under the keys; gradients are left with the parameters.

    By picture, with v the model's velocity at x_sigma under the picture's prompt, u its velocity there under the empty
    prompt, b the base's under the picture's prompt (all means over the latent numbers):

        |v - v*|² + w |v - b|²,   v* = u + s(sigma) (noise - x0 - u),   s(sigma) = 1 + (g - 1) sigma^decay

    The first term is the guided target: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) of what is
    trained towards. At its optimum v is what guidance of scale s makes of a plainly trained model. A dropped caption
    has the plain target: v is u there. The second term is learning without forgetting (Li and Hoiem 2016, arXiv
    1606.09282), as `objective.regularised_target` has it, on the training pictures themselves.

    u is the model as it is trained, with every adapter on it, and b is without any. Neither has a gradient. Each
    costs one pass without gradient, for the pictures that need it alone; pictures for regularisation and held ones
    share theirs. An adapter that is on beside what is trained, and left out of the result, is off in the v that is
    compared with b: that is what the result will draw. It takes another pass with gradient.

    Args:
        transformer: the network with `adapter` on it.
        adapter: what is trained, and whatever else is on: with it off the network is the base.
        batch: B pictures.
        weights: [B], of each picture in the gradient of the step.
        keys: of the recipe.
        roles: of the pictures.
        empty: the empty prompt, one.
        beside: the adapter that is left out of the result; None without one.
    """
    plain = batch.target
    target, base = plain.clone(), torch.zeros_like(plain)
    if rows := roles.compared:
        base[rows] = base_velocity(transformer, adapter, batch, rows).to(base.dtype)
    if keys.guided is not None and (rows := _where(roles.guided)):
        scale = decayed_scale(keys.guided.scale, batch.sigma[rows], keys.guided.decay)
        own = unconditional_velocity(transformer, batch, rows, empty).to(plain.dtype)
        target[rows] = guided_target(plain[rows], own, scale)
    trained, compared = _predicted(transformer, batch, roles, beside)
    apart, matched = _mean_square(compared - base), _mean_square(trained - target)
    losses = torch.where(torch.tensor(roles.regularised, device=plain.device), apart, matched)
    told = {"plain_loss": _mean_square(trained.detach() - plain)}
    if keys.guided is not None:
        told["guided_loss"] = losses.detach()
    if keys.hold is not None:
        held = losses.new_tensor(roles.held)
        losses = losses + keys.hold.weight * held * apart
        told |= {"hold_base_loss": held * apart.detach(), HELD: held}
    (losses @ weights).backward()
    return Learned(losses.detach(), told)


def _predicted(
    transformer: FluxTransformer2DModel, batch: NoisedBatch, roles: Roles, beside: Adapter | None
) -> tuple[Tensor, Tensor]:
    """The velocities that are compared with the target and with the base, [B, h*w/4, 4C]: the same without `beside`.

    With it zeros stand for pictures that are not compared so.
    """
    if beside is None:
        predicted = batch.velocity(transformer, batch.x_sigma, batch.sigma).to(batch.target.dtype)
        return predicted, predicted

    def some(rows: list[int]) -> Tensor:
        none = torch.zeros_like(batch.target)
        if not rows:
            return none
        part = batch.index(rows)
        found = part.velocity(transformer, part.x_sigma, part.sigma).to(none.dtype)
        return none.index_copy(0, torch.tensor(rows, device=none.device), found)

    trained = some(_where(not flag for flag in roles.regularised))
    with beside.disabled():
        return trained, some(roles.compared)


@torch.no_grad()
def base_velocity(
    transformer: FluxTransformer2DModel, adapter: Adapter, batch: NoisedBatch, rows: Sequence[int]
) -> Tensor:
    """b: what the frozen base, without the adapter, says of K of a batch's pictures; [K, h*w/4, 4C]."""
    some = batch.index(rows)
    with adapter.disabled():
        return some.velocity(transformer, some.x_sigma, some.sigma)


@torch.no_grad()
def unconditional_velocity(
    transformer: FluxTransformer2DModel, batch: NoisedBatch, rows: Sequence[int], empty: TextConditioning
) -> Tensor:
    """u: what the model as it is trained says of K of a batch's pictures under the empty prompt; [K, h*w/4, 4C]."""
    some = batch.index(rows)
    return some.velocity(transformer, some.x_sigma, some.sigma, empty.index([0] * len(rows)))


def told_parts(rows: Sequence[Sequence[float]], keys: FlowKeys) -> dict[str, float]:
    """Means over a step's pictures without those for regularisation; of the penalty over the held ones alone.

    Args:
        rows: of each picture its numbers, in the order of `Learned.told`.
        keys: of the recipe.
    """
    names = ["plain_loss", *(["guided_loss"] if keys.guided else []), *(["hold_base_loss", HELD] if keys.hold else [])]
    sums = {name: math.fsum(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    held = sums.pop(HELD, 0.0)
    counts = {name: held if name == "hold_base_loss" else float(len(rows)) for name in sums}
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


def extra_passes(recipe: Recipe) -> dict[str, float]:
    """Key -> passes without gradient that it adds to each picture's one with gradient, on average.

    Of sources with several `caption_dropout`, the one that drops the fewest captions counts.
    """
    keys = flow_keys(recipe)
    if keys is None:
        return {}
    found = {}
    trained = [source for source in recipe.data if not source.regularisation]
    if keys.guided is not None:
        found["guided_target"] = 1 - min(source.caption_dropout for source in trained)
    if keys.hold is not None:
        found["hold_base"] = _share_of_law(recipe, keys.hold.sigmas)
    return found


def second_passes(recipe: Recipe) -> float:
    """Passes with gradient that are added to each picture's one, on average.

    With a training adapter beside, the velocity that is held to the base is that without it, which takes its own pass.
    """
    keys = flow_keys(recipe)
    if keys is None or keys.hold is None or recipe.adapter.training_adapter is None:
        return 0.0
    return _share_of_law(recipe, keys.hold.sigmas)


def _share_of_law(recipe: Recipe, interval: tuple[float, float] | None) -> float:
    """How much of a recipe's law of noise levels lies within an interval; None: all."""
    if interval is None:
        return 1.0
    spec = recipe.sigmas
    law = make_law(spec.law, shift=spec.shift, uniform_floor=spec.uniform_floor, **spec.params)
    low, high = law.cdf(torch.tensor(interval, dtype=torch.float64)).tolist()
    return float(high - low)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean(dim=(1, 2))


def _where(flags: Iterable[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
