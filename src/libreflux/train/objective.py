"""What training minimises: flow matching, or staying with the base's velocity; in fp32, one number per picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux import keyed
from libreflux.adapter.files import Adapter
from libreflux.flow.path import interpolate, velocity_target
from libreflux.model.latents import image_ids, pack
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity


def keyed_noise(shape: Sequence[int], seed: int, *index: int | str) -> Tensor:
    """Standard normal noise, fp32 on the CPU, a function of (seed, "noise", index…) alone.

    Args:
        shape: of one sample, e.g. [C, h, w].
        seed: the recipe's seed.
        index: what tells this noise from any other of the run, e.g. sample id, step and slot.
    """
    return torch.randn(tuple(shape), generator=keyed.generator(seed, "noise", *index), dtype=torch.float32)


def flow_matching_loss(
    transformer: FluxTransformer2DModel,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    text: TextConditioning,
    *,
    guidance: float | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """|velocity(x_sigma, sigma, text) - (noise - x0)|², mean over the latent numbers of each picture.

    Lipman et al. 2022 (arXiv 2210.02747), eq. 23 with sigma_min = 0 and time running from data (sigma 0) to noise
    (sigma 1), the convention of FLUX. Path, target and difference are fp32; only the transformer runs in less.

    Args:
        transformer: the network, adapted or not.
        latents: [B, C, h, w], x0, normalised as the transformer expects them.
        noise: [B, C, h, w], standard normal.
        sigma: [B] fp32 in (0, 1).
        text: B prompts; an empty prompt where the caption was dropped.
        guidance: the value for a network with a guidance embedding, None for one without.
        target: [B, h*w/4, 4C] packed, to take the place of noise - x0; see `regularised_target`.

    Returns:
        [B] fp32. Weigh it by the pictures of the whole optimizer step; a short unit then counts for what it holds.

    Raises:
        ModelError: guidance is given to a network without guidance embedding, or is missing for one with it.
    """
    height, width = latents.shape[-2:]
    x_sigma = pack(interpolate(latents, noise, sigma))
    target = pack(velocity_target(latents, noise)) if target is None else target
    ids = image_ids(height, width, device=latents.device)
    # No autocast: the network runs in the dtype of its weights, as it does when it draws. On a bf16 base autocast gave
    # the same loss to the bit, and the same gradient error against fp32 (0.7 %).
    predicted = velocity(transformer, x_sigma, sigma, text, ids, guidance=guidance)
    return (predicted.to(target.dtype) - target).square().mean(dim=(1, 2))


def regularised_target(
    transformer: FluxTransformer2DModel,
    adapter: Adapter,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    text: TextConditioning,
    regularised: Sequence[bool],
    *,
    guidance: float | None = None,
) -> Tensor:
    """noise - x0, and for the regularised pictures the velocity that the base gives at the same x_sigma, sigma, text.

    Prior preservation (Ruiz et al. 2022, arXiv 2208.12242) without drawn class pictures: what is kept is the
    base's own velocity (Li and Hoiem 2016, arXiv 1606.09282). The loss against it and its gradient are zero while the
    adapter does nothing. Only the regularised pictures pay for the second pass, which keeps no graph.

    Args:
        transformer: the network with `adapter` on it.
        adapter: what is trained.
        latents: as for `flow_matching_loss`, and so are noise, sigma, text and guidance.
        regularised: B flags.

    Returns:
        [B, h*w/4, 4C] packed, fp32, without gradient.
    """
    target = pack(velocity_target(latents, noise))
    which = [index for index, flag in enumerate(regularised) if flag]
    if not which:
        return target
    height, width = latents.shape[-2:]
    ids = image_ids(height, width, device=latents.device)
    x_sigma = pack(interpolate(latents[which], noise[which], sigma[which]))
    with torch.no_grad(), adapter.disabled():
        kept = velocity(transformer, x_sigma, sigma[which], text.index(which), ids, guidance=guidance)
    target[which] = kept.to(target.dtype)
    return target
