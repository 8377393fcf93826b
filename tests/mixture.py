"""A mixture of two Gaussians, number by number: its exact velocity, with and without being told the component."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from libreflux.probing.metrics.measures import Velocity

SHARES, MEANS, STDS = (0.3, 0.7), (-1.2, 0.9), (0.3, 0.7)


def component_velocity(x: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[noise − x0 | x] for x0 ~ N(mean, std²), number by number."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    variance = ((1 - s) * std) ** 2 + s**2
    return (s - (1 - s) * std**2) / variance * (x - (1 - s) * mean) - mean


def null(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise − x0 | x] when nobody says which component a number comes from."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    scores, velocities = [], []
    for share, mean, std in zip(SHARES, MEANS, STDS, strict=True):
        scale = (((1 - s) * std) ** 2 + s**2).sqrt()
        scores.append(math.log(share) - scale.log() - ((x - (1 - s) * mean) / scale) ** 2 / 2)
        velocities.append(component_velocity(x, sigma, torch.tensor(mean), torch.tensor(std)))
    return (torch.stack(scores).softmax(dim=0) * torch.stack(velocities)).sum(dim=0)


def prompted(labels: Tensor) -> Velocity:
    """The velocity that is told every number's component: what a prompt is to a picture."""
    mean, std = torch.tensor(MEANS, dtype=torch.float64)[labels], torch.tensor(STDS, dtype=torch.float64)[labels]
    return lambda x, sigma: component_velocity(x, sigma, mean, std)
