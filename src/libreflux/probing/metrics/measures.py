"""How well a velocity fits pictures: loss and calibration by noise level, with intervals. Knows no model, no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.flow.path import interpolate, velocity_target

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity(x [B, …], sigma [B] fp32) → v̂ [B, …]."""
REPLICATES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Moments:
    """What N pictures at S noise levels say of a velocity v̂ against its target v = noise − x0.

    Attributes:
        sigmas: the S noise levels.
        error: [N, S] fp64, mean of (v̂ − v)² over each picture's numbers.
        cross: [N, S] fp64, mean of v̂·v.
        power: [N, S] fp64, mean of v̂².
    """

    sigmas: tuple[float, ...]
    error: np.ndarray
    cross: np.ndarray
    power: np.ndarray

    def __len__(self) -> int:
        return len(self.error)

    @staticmethod
    def cat(parts: Sequence[Moments]) -> Moments:
        """The pictures of all parts, at least one, in order; their sigmas are the same."""
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("error", "cross", "power"))
        return Moments(parts[0].sigmas, *columns)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity at S noise levels with its bootstrap interval over pictures; value, low and high are [S] fp64."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def paired_noise(shape: Sequence[int], seed: int, sample_id: str, sigma: float) -> Tensor:
    """Standard normal noise [*shape], fp32 on the CPU: a function of (seed, picture, sigma), alike for every model."""
    random = seeding.generator(seed, "held-out", sample_id, f"{sigma:.9g}")
    return torch.randn(tuple(shape), generator=random, dtype=torch.float32)


def moments(
    velocity: Velocity, x0: Tensor, sample_ids: Sequence[str], sigmas: Sequence[float], *, seed: int = 0
) -> Moments:
    """A velocity's moments at pictures under their own `paired_noise`.

    Args:
        velocity: under the prompts of these pictures; called once for each sigma.
        x0: [N, …] clean latents.
        sample_ids: the N pictures' ids.
        sigmas: S noise levels in (0, 1).
        seed: of the noise.
    """
    columns = []
    for sigma in sigmas:
        noise = torch.stack([paired_noise(x0.shape[1:], seed, name, sigma) for name in sample_ids]).to(x0.device)
        level = torch.full((len(x0),), sigma, device=x0.device)
        target = velocity_target(x0, noise)
        predicted = velocity(interpolate(x0, noise, level), level).to(target.dtype)
        products = ((predicted - target).square(), predicted * target, predicted.square())
        columns.append([product.flatten(1).mean(dim=1).cpu().double().numpy() for product in products])
    error, cross, power = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    return Moments(tuple(sigmas), error, cross, power)


def resampled(count: int, *, replicates: int = REPLICATES, seed: int = 0, purpose: str = "bootstrap") -> np.ndarray:
    """[replicates, count] weights of `count` pictures, each row one bootstrap sample of them (Efron 1979).

    The same pictures are drawn for every quantity, noise level and model: what is compared stays paired. Another
    `purpose` draws independently of it.
    """
    drawn = seeding.rng(seed, purpose, count).integers(count, size=(replicates, count))
    rows = np.arange(replicates)[:, None] * count
    times = np.bincount((drawn + rows).reshape(-1), minlength=replicates * count)
    return times.reshape(replicates, count) / count


def loss(found: Moments, weights: np.ndarray) -> Estimate:
    """Mean squared error of the velocity, what flow matching minimises; `weights` as of `resampled`."""
    return _estimate(lambda w: w @ found.error, weights)


def slope(found: Moments, weights: np.ndarray) -> Estimate:
    """The calibration slope k = ⟨v̂, v⟩ / ⟨v̂, v̂⟩, the factor by which scaling v̂ would lower the loss most.

    It is 1 for the minimiser of the loss within any family that is closed under scaling, the conditional mean above
    all; a velocity that is too sharp (guided, distilled to few steps, over-fitted) has k < 1. NaN where v̂ is zero.
    """
    return _estimate(lambda w: _ratio(w @ found.cross, w @ found.power), weights)


def prompt_gain(conditional: Moments, null: Moments, weights: np.ndarray) -> Estimate:
    """By how much the prompt lowers the loss: null loss − conditional loss, at the same pictures and noise."""
    return _estimate(lambda w: w @ (null.error - conditional.error), weights)


def _estimate(statistic: Callable[[np.ndarray], np.ndarray], weights: np.ndarray) -> Estimate:
    """`statistic` takes weights [R, N] to values [R, S]."""
    count = weights.shape[1]
    [value] = statistic(np.full((1, count), 1 / count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(weights), [tail, 1 - tail], axis=0)
    return Estimate(value, low, high)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
