"""The straight path between a picture and noise, and the four readings of a velocity on it.

Rectified flow (Liu et al. 2022, eq. 1; Esser et al. 2024, eq. 13) in FLUX's direction of time: sigma 0 is the picture,
sigma 1 is noise. All results are at least fp32: bf16 inputs are promoted, fp64 stays fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sigma = float | Tensor


def _promote(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _spread(sigma: Sigma, like: Tensor) -> Sigma:
    """sigma [B] as [B, 1, 1, …], in `like`'s dtype and on its device; a float or 0-d tensor stays one number."""
    if not isinstance(sigma, Tensor):
        return sigma
    sigma = sigma.to(device=like.device, dtype=like.dtype)
    if sigma.ndim == 0:
        return sigma
    if sigma.shape != like.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, wanted one per sample: ({like.shape[0]},)")
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise.

    Args:
        x0: clean latents [B, …].
        noise: standard normal noise of the same shape.
        sigma: [B] or one number, in [0, 1].
    """
    x0, noise = _promote(x0, noise)
    s = _spread(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = d x_sigma / d sigma = noise - x0, the regression target of flow matching; [B, …] like its inputs."""
    x0, noise = _promote(x0, noise)
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """The clean picture that this velocity points to: x0 = x - sigma v. Shapes as in `interpolate`."""
    x, velocity = _promote(x, velocity)
    return x - _spread(sigma, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """The noise that this velocity came from: noise = x + (1 - sigma) v. Shapes as in `interpolate`."""
    x, velocity = _promote(x, velocity)
    return x + (1 - _spread(sigma, x)) * velocity
