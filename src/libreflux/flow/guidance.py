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
