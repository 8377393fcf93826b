"""Attention masses taken beside a pass of the transformer, whose output stays the same to the bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from libreflux.errors import ModelError
from libreflux.model.attention_mass import AttentionMass, attention_mass
from libreflux.model.offload import blocks_of

Told = Callable[[int, AttentionMass], None]
"""Called with the number of a block, double ones first, and its masses."""


@contextmanager
def attention_masses(
    transformer: FluxTransformer2DModel, told: Told, *, sample: int, text: int, own: int
) -> Iterator[None]:
    """Within the block, a call of `velocity` tells the masses of every block, at one sample.

    Queries and keys are computed a second time for that sample; what computes attention is called as it is. So the
    velocity has the same bits with int8 weights, adapters, and blocks that wait in RAM too. The blocks must not be
    compiled.

    Args:
        transformer: FLUX's.
        told: see `Told`.
        sample: which one of the batch.
        text: how many text tokens the batch is wide.
        own: of these, how many at the start are the prompt's own.

    Raises:
        ModelError: blocks whose attention is not diffusers' own.
    """
    blocks = blocks_of(transformer)
    with ExitStack() as held:
        for number, block in enumerate(blocks):
            attention = _attention(block)
            before = attention.processor
            recording = _Recording(before, functools.partial(told, number), sample, text, own)
            attention.processor = recording
            held.callback(setattr, attention, "processor", before)
        yield


def queries_and_keys(
    attention: FluxAttention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What attention compares: two of [B, S, H, D], text first, after norms and rotary embedding, as diffusers has it.

    Args:
        attention: of a double block or of a single one.
        hidden_states: [B, N, C] of the image, in a single block [B, S, C] of text and image.
        encoder_hidden_states: [B, T, C] of the text; None in a single block.
        rotary: two of [S, D]; None turns nothing.
    """
    any_attention: Any = attention
    query, key = _projected(any_attention, hidden_states, "to_q", "to_k", "to_qkv")
    query, key = any_attention.norm_q(query), any_attention.norm_k(key)
    if encoder_hidden_states is not None:
        added = _projected(any_attention, encoder_hidden_states, "add_q_proj", "add_k_proj", "to_added_qkv")
        query = torch.cat([any_attention.norm_added_q(added[0]), query], dim=1)
        key = torch.cat([any_attention.norm_added_k(added[1]), key], dim=1)
    if rotary is not None:
        query, key = (apply_rotary_emb(each, rotary, sequence_dim=1) for each in (query, key))
    return query, key


def _projected(attention: Any, states: Tensor, query: str, key: str, fused: str) -> list[Tensor]:
    if attention.fused_projections:
        both = getattr(attention, fused)(states).chunk(3, dim=-1)[:2]
    else:
        both = [getattr(attention, name)(states) for name in (query, key)]
    return [each.unflatten(-1, (-1, attention.head_dim)) for each in both]


class _Recording(FluxAttnProcessor):
    """Calls another processor, and tells the masses of one sample."""

    def __init__(self, inner: Any, told: Callable[[AttentionMass], None], sample: int, text: int, own: int) -> None:
        super().__init__()
        self.inner, self.told, self.sample, self.text, self.own = inner, told, sample, text, own

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        one = slice(self.sample, self.sample + 1)
        with torch.no_grad():
            words = None if encoder_hidden_states is None else encoder_hidden_states[one]
            query, key = queries_and_keys(attn, hidden_states[one], words, image_rotary_emb)
            bias = None if attention_mask is None else _bias(attention_mask, self.sample)
            self.told(attention_mass(query[0], key[0], text=self.text, own=self.own, bias=bias))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _bias(mask: Tensor, sample: int) -> Tensor:
    """What is added to the logits of a sample's keys, [S]: a bool mask hides, another one is added."""
    row = mask[sample if len(mask) > 1 else 0].flatten()
    if row.dtype != torch.bool:
        return row.float()
    return torch.zeros(len(row), device=row.device).masked_fill(~row, -math.inf)


def _attention(block: nn.Module) -> Any:
    attention = getattr(block, "attn", None)
    if not isinstance(attention, FluxAttention):
        raise ModelError(
            f"{type(block).__name__} has no attention that can be recorded", hint="use a FluxTransformer2DModel"
        )
    return attention
