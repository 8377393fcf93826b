"""Guidance on velocities."""

from __future__ import annotations

import torch
from torch import Tensor


def cfg(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), v_u + g (v_c - v_u): 1 is the conditional velocity, 0 the other.

    Args:
        v_cond: velocity under the prompt, [B, …].
        v_uncond: velocity under the negative (or empty) prompt, same shape.
        scale: the guidance scale g, any real number.
    """
    return v_uncond + scale * (v_cond - v_uncond)


def rescale(v_guided: Tensor, v_cond: Tensor, phi: float) -> Tensor:
    """Guidance rescale (Lin et al. 2023, arXiv 2305.08891, eq. 15-16): a guided velocity with less excess of contrast.

    v' = v_guided std(v_cond) / std(v_guided), then phi v' + (1 - phi) v_guided; the deviations are each sample's own.

    Args:
        v_guided: from `cfg`, [B, …].
        v_cond: velocity under the prompt, same shape.
        phi: in [0, 1]; 0 leaves `v_guided`, 1 gives it the deviation of `v_cond`.
    """
    rest = list(range(1, v_cond.ndim))
    ratio = v_cond.std(rest, keepdim=True) / v_guided.std(rest, keepdim=True)
    return v_guided * (phi * ratio + (1 - phi))


def parallel(update: Tensor, onto: Tensor) -> Tensor:
    """The part of each sample's update that lies along another vector: onto <update, onto> / ||onto||^2.

    Args:
        update: [B, …].
        onto: same shape; where it is zero, so is the part.
    """
    return _along(update, onto) * onto


def apg(
    v_cond: Tensor,
    v_uncond: Tensor,
    scale: float,
    *,
    x: Tensor,
    sigma: float,
    eta: float = 0.0,
    radius: float | None = None,
    momentum: float = 0.0,
    average: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416).

    In pictures D = x - sigma v, with m the momentum: A = (D_c - D_u) + m A_before; A' = A min(1, r / ||A||);
    D = D_c + (g - 1) (A'_orthogonal + eta A'_parallel), both to D_c. As a velocity that is
    v_u + g (v_c - v_u) + (g - 1) (d' - d) with d = v_c - v_u and d' = -(A'_orthogonal + eta A'_parallel) / sigma:
    at eta 1 without radius and momentum `cfg`, to the bit.

    Args:
        v_cond, v_uncond, scale: see `cfg`.
        x: where the velocities were computed, [B, …].
        sigma: the noise level there, above 0.
        eta: how much of the parallel part stays, which is what saturates; 1 is all.
        radius: the largest norm r of a sample's update, over all its numbers; None is no limit.
        momentum: m; below 0 it takes back what earlier steps added.
        average: A_before, from the step before; None at the first.

    Returns:
        The guided velocity, and A for the next step; both of the shape of `v_cond`.
    """
    plain = v_cond - v_uncond
    update = -sigma * plain
    change = plain  # the update as a velocity, -A / sigma
    if average is not None and momentum:
        change = change - momentum * average / sigma
        update = update + momentum * average
    if radius is not None:
        rest = list(range(1, update.ndim))
        norm = torch.linalg.vector_norm(update, dim=rest, keepdim=True)
        change = change * (radius / norm).clamp(max=1.0)
    change = change - (1 - eta) * parallel(change, x - sigma * v_cond)
    return cfg(v_cond, v_uncond, scale) + (scale - 1) * (change - plain), update


def zero_star_scale(v_cond: Tensor, v_uncond: Tensor) -> Tensor:
    """CFG-Zero*'s s = <v_c, v_u> / ||v_u||^2 (Fan et al. 2025, arXiv 2503.18886), [B, 1, …]: each sample's own.

    It makes ||v_c - s v_u|| least; equal velocities have 1.
    """
    return _along(v_cond, v_uncond)


def cfg_zero_star(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886) without its first steps of zero: `cfg` from s v_u.

    (1 - g) s v_u + g v_c, with s of `zero_star_scale`.

    Args:
        v_cond, v_uncond, scale: see `cfg`.
    """
    return cfg(v_cond, zero_star_scale(v_cond, v_uncond) * v_uncond, scale)


def _along(vectors: Tensor, onto: Tensor) -> Tensor:
    """<vectors, onto> / ||onto||^2 of each sample, [B, 1, …]; 0 where `onto` is zero."""
    rest = list(range(1, onto.ndim))
    square = (onto * onto).sum(rest, keepdim=True)
    product = (vectors * onto).sum(rest, keepdim=True)
    return torch.where(square > 0, product / square, torch.zeros_like(square))


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized attention guidance (Chen et al. 2025, arXiv 2505.21179), on what attention gives a token.

    Z~ = Z+ + s (Z+ - Z-); its L1 norm is cut to tau times that of Z+; alpha of that, and 1 - alpha of Z+.

    Args:
        positive: Z+, what image tokens get beside the prompt, [B, N, C], all heads together.
        negative: Z-, what the same queries get beside the negative prompt, same shape.
        scale: s, at least 0; 0 leaves Z+ but for rounding. Other programs call s + 1 the scale.
        tau: at least 1.
        alpha: in [0, 1]; 0 is Z+.

    Returns:
        [B, N, C], in the dtype of `positive`; computed in fp32.
    """
    wide, other = positive.float(), negative.float()
    beyond = wide + scale * (wide - other)
    norm, most = beyond.abs().sum(-1, keepdim=True), tau * wide.abs().sum(-1, keepdim=True)
    capped = beyond * torch.where(norm > most, most / norm, torch.ones_like(norm))
    return (alpha * capped + (1 - alpha) * wide).to(positive.dtype)


def decayed_scale(scale: float, sigma: Tensor, decay: float) -> Tensor:
    """1 + (g - 1) sigma^decay, [B] as sigma: the whole scale g at noise, less the nearer to the picture.

    Args:
        scale: g; 1 is 1 at every sigma.
        sigma: [B] in (0, 1].
        decay: 0 or more; 0 is g at every sigma.
    """
    return 1 + (scale - 1) * sigma**decay


def guided_target(target: Tensor, v_uncond: Tensor, scale: Tensor) -> Tensor:
    """A training target under guidance: u + s (target - u), written as target + (s - 1) (target - u).

    `cfg` with the target in the place of the conditional velocity. In this form 1 leaves the target, to the bit.

    Args:
        target: velocity that is trained towards, [B, …].
        v_uncond: u, the velocity under the empty prompt, same shape.
        scale: s of each sample, [B].
    """
    return target + (scale - 1).view(-1, *[1] * (target.ndim - 1)) * (target - v_uncond)
