"""Guidance on velocities."""

from __future__ import annotations

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
