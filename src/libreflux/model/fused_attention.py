"""FLUX's attention with the norms and rotations of queries and keys as one step of autograd.

diffusers' own way takes 16 operations for each of four or two tensors of a block forward, and 28 back; on a card the
host then waits for launches, on a CPU each passes through memory. Here queries and keys of text and image lie in one
tensor: 14 operations forward, 14 back. On a CPU the forward pass has the same bits; the gradient stays in fp32
for longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_attention(transformer: FluxTransformer2DModel) -> None:
    """Puts `FusedAttnProcessor` in the place of diffusers' default one; any other processor stays."""
    for module in transformer.modules():
        if isinstance(module, FluxAttention) and type(module.processor) is FluxAttnProcessor:
            module.set_processor(FusedAttnProcessor())


class FusedAttnProcessor(FluxAttnProcessor):
    """diffusers' processor, with `norm_and_rotate` for what it does to queries and keys one by one.

    It leaves to diffusers what it does not know: fused projections, autocast, norms that are trained or of another
    dtype, and calls that are compiled, where the compiler fuses.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if image_rotary_emb is None or not _known(attn, hidden_states):
            plain: Tensor | tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return plain
        query, key, value = (_heads(layer(hidden_states), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
        queries, keys, values = [(query, attn.norm_q)], [(key, attn.norm_k)], value
        if encoder_hidden_states is not None:
            text = [
                _heads(layer(encoder_hidden_states), attn)
                for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            queries.insert(0, (text[0], attn.norm_added_q))
            keys.insert(0, (text[1], attn.norm_added_k))
            values = torch.cat([text[2], value], dim=1)
        query, key = norm_and_rotate([*queries, *keys], *image_rotary_emb).unbind(1)
        seen = _attend(self, query, key, values, attention_mask)
        if encoder_hidden_states is None:
            return seen
        of_text, of_image = seen.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        out: Tensor = attn.to_out[1](attn.to_out[0](of_image.contiguous()))
        return out, attn.to_add_out(of_text.contiguous())


def _known(attn: FluxAttention, hidden_states: Tensor) -> bool:
    added = (attn.norm_added_q, attn.norm_added_k) if attn.added_kv_proj_dim is not None else ()
    norms = (attn.norm_q, attn.norm_k, *added)
    return (
        not torch.compiler.is_compiling()
        and not attn.fused_projections
        and (hidden_states.is_meta or not torch.is_autocast_enabled(hidden_states.device.type))
        and all(_frozen(norm, hidden_states) for norm in norms)
        and len({norm.eps for norm in norms}) == 1
    )


def _frozen(norm: nn.Module, states: Tensor) -> bool:
    """Whether a norm's weight can be read as it is: what moves weights by hooks brings them when the norm is called."""
    weight = norm.weight if isinstance(norm, nn.RMSNorm) else None
    if weight is None or weight.requires_grad or norm._forward_pre_hooks or hasattr(norm, "_hf_hook"):
        return False
    return weight.dtype == states.dtype and weight.device == states.device


def _heads(states: Tensor, attn: FluxAttention) -> Tensor:
    return states.unflatten(-1, (-1, attn.head_dim))


def _attend(processor: FluxAttnProcessor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out: Tensor = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.flatten(2, 3).to(query.dtype)


def norm_and_rotate(parts: Sequence[tuple[Tensor, nn.Module]], cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) over each head, then rotary embedding (arXiv:2104.09864).

    Args:
        parts: (tensor [B, S_i, H, D], its RMSNorm), queries first and then as many keys; the S_i of the queries, and of
            the keys, sum up to S. The norms have one eps and frozen weights.
        cos: [S, D] fp32, each number twice in a row.
        sin: [S, D] fp32, likewise.

    Returns:
        [B, 2, S, H, D]: queries and keys.
    """
    norms: list[Any] = [norm for _, norm in parts]
    weight = torch.cat([norm.weight.expand(part.shape[1], -1) for (part, _), norm in zip(parts, norms, strict=True)])
    both = torch.cat([part for part, _ in parts], dim=1).unflatten(1, (2, len(cos)))
    rotated: Tensor = _NormAndRotate.apply(both, weight.view(2, len(cos), 1, -1), cos, sin, norms[0].eps)
    return rotated


def plain_norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The twin of the step below, by autograd: x [B, 2, S, H, D], weight [2, S, 1, D], cos and sin [S, D]."""
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype).float()
    turned = torch.stack([-normed[..., 1::2], normed[..., ::2]], dim=-1).flatten(-2)
    return (normed * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def _swapped(x: Tensor) -> Tensor:
    """Each pair (a, b) as (b, a)."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


class _NormAndRotate(torch.autograd.Function):
    """With y = x r w, r = 1 / sqrt(mean(x²) + eps), and z = y cos + swap(y) signed sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        signed = torch.stack([-sin[..., ::2], sin[..., 1::2]], dim=-1)  # no number of the host's: a card would wait
        cos, signed = cos[:, None], signed.flatten(-2)[:, None]
        wide = x.float()
        root = torch.rsqrt_(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, cos, signed, root)
        wide = torch.mul(wide, root, out=None if wide is x else wide).mul_(weight)
        if x.dtype != torch.float32:  # as between diffusers' norm and its rotation
            wide.copy_(wide.to(x.dtype))
        turned = _swapped(wide).mul_(signed)
        return wide.mul_(cos).add_(turned).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, cos, signed, root = ctx.saved_tensors
        above = grad.float()
        by_y = torch.mul(above, cos)
        by_y.add_(_swapped(torch.mul(above, signed, out=None if above is grad else above))).mul_(weight)
        del above
        wide = x.float()
        along = torch.mul(by_y, wide).mean(-1, keepdim=True).mul_(root).mul_(root)
        return by_y.addcmul_(wide, along, value=-1).mul_(root).to(x.dtype), None, None, None, None
