"""Pixels to latents to the transformer's packed tokens, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model.numerics import pinned
from libreflux.values import MOST_SIDE, SIDE_STEP

TILE_ABOVE = 1536
"""Pixels of the longer side beyond which a picture is decoded in tiles, unless the caller says otherwise."""


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Normalised mean of the posterior, z = (mu - shift) * scale: no noise, so a cache is a pure function.

    Args:
        vae: FLUX's or one of its shape.
        pixels: [B, 3, H, W] in [-1, 1], H and W multiples of the VAE's stride (8).

    Returns:
        [B, C, H / 8, W / 8] in the VAE's dtype.
    """
    with pinned(vae.device):
        mean = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode()
    shift, scale = _normalisation(vae)
    return (mean - shift) * scale


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the posterior, normalised: the mean is `encode`'s, std = posterior std * scale.

    A sample of the posterior is mean + std * eps, eps standard normal (Kingma and Welling 2013, eq. 10).

    Args:
        vae: see `encode`.
        pixels: see `encode`.

    Returns:
        Two of [B, C, H / 8, W / 8] in the VAE's dtype; the second is zero or above.
    """
    with pinned(vae.device):
        found = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    shift, scale = _normalisation(vae)
    return (found.mode() - shift) * scale, found.std * abs(scale)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The picture of latents [B, C, h, w]: [B, 3, 8h, 8w], about [-1, 1] and not clipped, in the VAE's dtype.

    The latents must be where the VAE computes, which under diffusers' offloading is not `vae.device`.
    """
    shift, scale = _normalisation(vae)
    with pinned(latents.device, drawing=True):
        picture: Tensor = vae.decode((latents / scale + shift).to(vae.dtype)).sample
    return picture


def to_bytes(pixels: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 on the CPU of decoded pictures [B, 3, H, W]: -1 is 0, 1 is 255, what is beyond is clipped."""
    return rearrange(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte(), "b c h w -> b h w c").cpu()


def own_side(config: Mapping[str, Any], where: object = None) -> int:
    """Pixels per side that a VAE was made for, in multiples of 16, as its config.json says (1024 where it does not).

    Raises:
        ModelError: no number, or one that no picture has.
    """
    side = config.get("sample_size", 1024)
    if not isinstance(side, int) or not 1 <= side <= MOST_SIDE:
        hint = f"write 1 to {MOST_SIDE} in the VAE's config.json"
        raise ModelError(f"sample_size cannot be {side!r}", where=where, hint=hint)
    return max(SIDE_STEP, side // SIDE_STEP * SIDE_STEP)


def stride(vae: AutoencoderKL) -> int:
    """Pixels per latent, along each side (8)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] to tokens [B, HW/4, 4C]: 2x2 patches, channel index c*4 + row*2 + column.

    Raises:
        ModelError: an odd side.
    """
    if latents.shape[-2] % 2 or latents.shape[-1] % 2:
        raise ModelError(
            f"latents of {latents.shape[-2]}x{latents.shape[-1]} have an odd side", hint="use sizes in multiples of 16"
        )
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: tokens [B, HW/4, 4C] to latents [B, C, height, width] (latent units)."""
    return rearrange(packed, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, w=width // 2, ph=2, pw=2)


def image_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Positions (0, row, column) of the tokens of latents [height, width], [HW/4, 3] fp32, in `pack`'s order."""
    rows = torch.arange(height // 2, device=device, dtype=torch.float32)
    columns = torch.arange(width // 2, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def _normalisation(vae: AutoencoderKL) -> tuple[float, float]:
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    return (0.0 if shift is None else shift), (1.0 if scale is None else scale)
