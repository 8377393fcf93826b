"""Loss and slope against the truth: a mixture of Gaussians, whose exact velocity and Bayes loss are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.flow.guidance import cfg
from libreflux.flow.path import interpolate, velocity_target
from libreflux.probing.metrics.measures import (
    Estimate,
    Moments,
    loss,
    moments,
    paired_noise,
    prompt_gain,
    resampled,
    slope,
)
from mixture import MEANS, SHARES, STDS, component_velocity, null, prompted

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PICTURES = 300


def bayes_losses(sigma: float) -> tuple[float, float]:
    """(conditional, null) least losses per number: closed form, and a quadrature for what the label explains."""
    x = np.linspace(-12, 12, 40_001)
    within, density, mixed, square = 0.0, np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for share, mean, std in zip(SHARES, MEANS, STDS, strict=True):
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        covariance = sigma - (1 - sigma) * std**2
        within += share * (1 + std**2 - covariance**2 / variance)
        part = share * scipy.stats.norm.pdf(x, (1 - sigma) * mean, math.sqrt(variance))
        velocity = covariance / variance * (x - (1 - sigma) * mean) - mean
        density, mixed, square = density + part, mixed + part * velocity, square + part * velocity**2
    return within, within + float(scipy.integrate.trapezoid(square - mixed**2 / np.maximum(density, 1e-300), x))


@pytest.fixture(scope="module")
def mixture() -> tuple[Tensor, Tensor, list[str]]:
    """(x0 [N, 1, 32, 32] fp64, labels alike, ids)."""
    random = seeding.rng(0, "mixture")
    labels = torch.from_numpy((random.random((PICTURES, 1, 32, 32)) < SHARES[1]).astype(np.int64))
    mean, std = torch.tensor(MEANS, dtype=torch.float64)[labels], torch.tensor(STDS, dtype=torch.float64)[labels]
    x0 = mean + std * torch.from_numpy(random.standard_normal(labels.shape))
    return x0, labels, [f"{number:032x}" for number in range(PICTURES)]


Mixture = tuple[Tensor, Tensor, list[str]]


def near(found: Estimate, truth: np.ndarray | float) -> None:
    """Within twice its interval (four standard errors), which is narrow."""
    spare = (found.high - found.low) / 2
    assert (spare > 0).all()
    assert (spare < 0.02).all()
    assert (found.low - spare <= truth).all(), (found, truth)
    assert (truth <= found.high + spare).all(), (found, truth)


def test_the_exact_velocity_has_slope_one_and_the_bayes_loss(mixture: Mixture) -> None:
    x0, labels, ids = mixture
    weights = resampled(PICTURES)
    known, unknown = moments(prompted(labels), x0, ids, SIGMAS), moments(null, x0, ids, SIGMAS)
    truth = np.array([bayes_losses(sigma) for sigma in SIGMAS])
    near(slope(known, weights), 1.0)
    near(slope(unknown, weights), 1.0)
    near(loss(known, weights), truth[:, 0])
    near(loss(unknown, weights), truth[:, 1])
    near(prompt_gain(known, unknown, weights), truth[:, 1] - truth[:, 0])


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_inside_the_velocity_lowers_the_slope_as_it_must(mixture: Mixture, scale: float) -> None:
    """E[v_c | x] = v_u, so ⟨v_u, v_c⟩ = ⟨v_u, v_u⟩: with powers C and U, k = ((1−g)U + gC) / ((1−g²)U + g²C)."""
    x0, labels, ids = mixture
    conditional = prompted(labels)
    guided = moments(lambda x, s: cfg(conditional(x, s), null(x, s), scale), x0, ids, SIGMAS)
    found = slope(guided, resampled(PICTURES))
    target = 1 + sum(share * (mean**2 + std**2) for share, mean, std in zip(SHARES, MEANS, STDS, strict=True))
    told, untold = target - np.array([bayes_losses(sigma) for sigma in SIGMAS]).T
    near(found, ((1 - scale) * untold + scale * told) / ((1 - scale**2) * untold + scale**2 * told))
    assert (found.high < 1).all()


def test_the_slope_is_the_least_squares_factor_and_a_scale_divides_it(mixture: Mixture) -> None:
    x0, _, ids = mixture
    weights = resampled(PICTURES, replicates=50)
    plain = slope(moments(null, x0, ids, [0.7]), weights)
    noise = torch.stack([paired_noise(x0.shape[1:], 0, name, 0.7) for name in ids])
    predicted = null(interpolate(x0, noise, 0.7), torch.full((PICTURES,), 0.7))
    reference = np.linalg.lstsq(predicted.reshape(-1, 1).numpy(), velocity_target(x0, noise).reshape(-1).numpy())[0]
    assert plain.value == pytest.approx(reference, rel=1e-6)
    for factor in (0.5, -2.0, 3.7):

        def field(x: torch.Tensor, s: torch.Tensor, c: float = factor) -> torch.Tensor:
            return c * null(x, s)

        scaled = slope(moments(field, x0, ids, [0.7]), weights)
        np.testing.assert_allclose(scaled.value, plain.value / factor, rtol=1e-12)
    assert np.isnan(slope(moments(lambda x, s: 0 * x, x0, ids, [0.7]), weights).value).all()


def test_every_model_and_every_batch_sees_the_same_noise(mixture: Mixture) -> None:
    x0, _, ids = mixture
    whole = moments(null, x0[:6], ids[:6], SIGMAS)
    parts = [moments(null, x0[rows], [ids[row] for row in rows], SIGMAS) for rows in ([4, 5], [3], [0, 1, 2])]
    mixed = Moments.cat(parts[::-1])
    order = [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(mixed.error, whole.error[order])
    alone = moments(null, x0[:6], ids[:6], SIGMAS[3:4])  # also when other sigmas are asked for
    np.testing.assert_array_equal(alone.cross[:, 0], whole.cross[:, 3])
    draws = {paired_noise((1,), *key).item() for key in ((0, "a", 0.1), (1, "a", 0.1), (0, "b", 0.1), (0, "a", 0.2))}
    assert len(draws) == 4


def picture_moments(count: int, sigma: float, random: np.random.Generator) -> Moments:
    """Of the exact velocity on pictures of 16 numbers of one component, which it is told: pictures differ in kind."""
    label = (random.random((count, 1)) < SHARES[1]).astype(int)
    mean, std = np.array(MEANS)[label], np.array(STDS)[label]
    x0, noise = mean + std * random.standard_normal((count, 16)), random.standard_normal((count, 16))
    x = torch.from_numpy((1 - sigma) * x0 + sigma * noise)
    level = torch.full((count,), sigma, dtype=torch.float64)
    v = component_velocity(x, level, torch.from_numpy(mean), torch.from_numpy(std)).numpy()
    target = noise - x0
    means = (product.mean(axis=1, keepdims=True) for product in ((v - target) ** 2, v * target, v**2))
    return Moments((sigma,), *means)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    weights, hits = resampled(40), np.zeros(2)
    truth = bayes_losses(0.5)[0]
    for replication in range(300):
        found = picture_moments(40, 0.5, seeding.rng(0, "replication", replication))
        for column, (estimate, value) in enumerate(((slope(found, weights), 1.0), (loss(found, weights), truth))):
            hits[column] += estimate.low[0] <= value <= estimate.high[0]
    assert (hits >= 0.90 * 300).all(), hits / 300
    assert (hits <= 0.99 * 300).all(), hits / 300


def test_intervals_are_scipys() -> None:
    found = picture_moments(30, 0.5, seeding.rng(0, "scipy"))
    weights = resampled(30, replicates=20_000)
    pair = (found.cross[:, 0], found.power[:, 0])
    ratio = scipy.stats.bootstrap(
        pair, lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, method="percentile", n_resamples=20_000
    ).confidence_interval
    mean = scipy.stats.bootstrap((found.error[:, 0],), np.mean, method="percentile", n_resamples=20_000)
    for ours, theirs in ((slope(found, weights), ratio), (loss(found, weights), mean.confidence_interval)):
        width = theirs.high - theirs.low
        assert ours.low[0] == pytest.approx(theirs.low, abs=0.05 * width)
        assert ours.high[0] == pytest.approx(theirs.high, abs=0.05 * width)
