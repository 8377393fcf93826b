"""The one place that calls the transformer: which text tokens, which mask, which sigma."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import ModelError
from libreflux.model import numerics
from libreflux.model.text import TextConditioning

_timestep: ContextVar[Tensor | None] = ContextVar("libreflux_timestep", default=None)


def velocity(
    transformer: FluxTransformer2DModel,
    packed: Tensor,
    sigma: Tensor,
    text: TextConditioning,
    image_ids: Tensor,
    *,
    guidance: float | None = None,
) -> Tensor:
    """The model's velocity v(x_sigma, sigma, text) = E[noise - x0 | ...] at B samples.

    Text goes in as it is encoded, by default without padding: the batch is as wide as its longest prompt, shorter ones
    are masked, and there is no mask at all when lengths agree. Masking is the same as trimming: text ids are
    all zero, image queries see keys only, and nothing reads a padded row.

    Args:
        transformer: FLUX's; its weights' dtype is that of the computation, unless autocast says otherwise.
        packed: [B, N, 4C], x_sigma as of `latents.pack`.
        sigma: [B] in [0, 1]; reaches the timestep embedding in fp32 as 1000 sigma, whatever the model's dtype.
        text: B prompts.
        image_ids: [N, 3], as of `latents.image_ids`.
        guidance: the embedded guidance of a guidance-distilled model (FLUX.1-dev); None for one without the embedding.

    Returns:
        [B, N, 4C], fp32 or wider.

    Raises:
        ModelError: `guidance` for a model without its embedding, or none for one with it; sizes that do not agree; text
            of padding `bias` and several lengths.
    """
    _check(transformer, packed, sigma, text, guidance)
    device, dtype = packed.device, _weights_dtype(transformer)
    text = text.to(device, dtype)
    embeds, mask = text.padded()
    seen = None if mask is None else _attention_mask(mask, packed.shape[1])
    if text.favoured is not None:
        bias = _attention_bias(text.favoured, embeds.shape[1], packed.shape[1], _query_dtype(device, dtype))
        seen = bias.to(device, non_blocking=True)
    sigma = sigma.to(device=device, dtype=torch.float32)
    numerics.pin_checkpointing(transformer)
    with numerics.pinned(device, drawing=not torch.is_grad_enabled()), _fp32_timestep(transformer, 1000 * sigma):
        output: Tensor = transformer(
            hidden_states=packed.to(dtype),
            encoder_hidden_states=embeds,
            pooled_projections=text.pooled,
            timestep=sigma,
            img_ids=image_ids.to(device),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=image_ids.dtype),
            guidance=None if guidance is None else torch.full_like(sigma, guidance),
            joint_attention_kwargs=None if seen is None else {"attention_mask": seen},
            return_dict=False,
        )[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _attention_mask(text_mask: Tensor, image_tokens: int) -> Tensor:
    """bool [B, 1, 1, S + N], text first; True is seen. Must be bool: diffusers *adds* a float mask to the logits."""
    image = text_mask.new_ones(text_mask.shape[0], image_tokens)
    return torch.cat([text_mask, image], dim=1)[:, None, None, :]


def _attention_bias(favoured: Sequence[int], width: int, image_tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, S + N]: 1, added to the logits, on each prompt's own tokens and on the image, 0 on padding."""
    ends = torch.tensor(favoured)[:, None]
    text = torch.arange(width) < ends
    both = torch.cat([text, text.new_ones(len(favoured), image_tokens)], dim=1)[:, None, None, :]
    return both.to(dtype)


def _query_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """What attention computes in: a float mask of another dtype is refused, or costs a slower kernel."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


@contextmanager
def _fp32_timestep(transformer: nn.Module, timestep: Tensor) -> Iterator[None]:
    """Within the block, `time_text_embed` gets `timestep` instead of what diffusers rounds to the hidden dtype.

    In bf16, autocast included, diffusers' own path leaves 126 sigmas in [0.5, 1). The hook is installed once and
    stays; it acts only inside this block, and a context variable keeps threads apart.
    """
    embed: nn.Module = transformer.time_text_embed  # type: ignore[assignment]
    if _supply_timestep not in embed._forward_pre_hooks.values():
        embed.register_forward_pre_hook(_supply_timestep)
    token = _timestep.set(timestep)
    try:
        yield
    finally:
        _timestep.reset(token)


def _supply_timestep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    timestep = _timestep.get()
    if timestep is None:
        return None
    if not args or not isinstance(args[0], Tensor) or args[0].shape != timestep.shape:
        raise RuntimeError("diffusers no longer passes the timestep first to time_text_embed")
    return (timestep, *args[1:])


def _weights_dtype(transformer: nn.Module) -> torch.dtype:
    """The base's dtype, read from a norm: linears may carry adapters in fp32 or quantised weights, norms never do."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("norm_q.weight"):
            return parameter.dtype
    raise ModelError(f"{type(transformer).__name__} has no attention norms", hint="use a FluxTransformer2DModel")


def _check(
    transformer: FluxTransformer2DModel, packed: Tensor, sigma: Tensor, text: TextConditioning, guidance: float | None
) -> None:
    batch = packed.shape[0]
    if text.favoured is not None and len(set(text.lengths)) > 1:
        raise ModelError("text of padding bias has several lengths", hint="encode all of it with one max_tokens")
    if sigma.shape != (batch,) or len(text) != batch:
        raise ModelError(f"{batch} samples, sigma of shape {tuple(sigma.shape)}, {len(text)} prompts do not agree")
    wanted = (transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim)
    if text.tokens and (widths := (text.tokens[0].shape[-1], text.pooled.shape[-1])) != wanted:
        told = f"text {widths[0]} and {widths[1]} wide, and the transformer reads {wanted[0]} and {wanted[1]}"
        raise ModelError(told, hint="use the text encoders of the transformer's own model")
    if transformer.config.guidance_embeds and guidance is None:
        raise ModelError("this model needs an embedded guidance", hint="pass guidance, e.g. 3.5")
    if guidance is not None and not transformer.config.guidance_embeds:
        raise ModelError("this model has no guidance embedding", hint="use guidance_scale (classifier-free guidance)")
