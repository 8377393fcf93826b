"""Latents to pixels to pictures."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from libreflux.model.latents import TILE_ABOVE, decode, stride
from libreflux.sample.finite import check_pixels


def decoded(vae: AutoencoderKL, latents: Tensor, tile: bool | None = None) -> Tensor:
    """[B, C, H/8, W/8] to [B, 3, H, W] in [0, 1], fp32.

    Args:
        vae: FLUX's or one of its shape; left as it was.
        latents: normalised.
        tile: diffusers' tiled decoding, whose tiles have the size that the VAE was made for; None: above `TILE_ABOVE`.

    Raises:
        NotFiniteError: the pixels overflow or are NaN.
    """
    large = max(latents.shape[-2:]) * stride(vae) > TILE_ABOVE
    before = vae.use_tiling
    vae.use_tiling = (before or large) if tile is None else tile
    try:
        # One by one: the VAE's activations are large, and batch mates stay without effect.
        pixels = torch.cat([decode(vae, one[None]) for one in latents]).float()
    finally:
        vae.use_tiling = before
    check_pixels(pixels, vae)
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [0, 1] to 8-bit pictures, rounded to the nearest."""
    array = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in array]
