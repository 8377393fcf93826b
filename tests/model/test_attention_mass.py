"""Attention masses against a naive softmax: streamed in blocks, under masks, and beside the real pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from libreflux.model.attention_mass import READERS, AttentionMass, attention_mass
from libreflux.model.attention_record import attention_masses
from libreflux.model.fused_attention import FusedAttnProcessor, fuse_attention
from libreflux.model.latents import image_ids
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from model.bases import adapted, based
from model.random_inputs import run
from tiny import tiny_transformer

TEXT, IMAGE, HEADS, DIM = 37, 61, 3, 8


def drawn(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Queries and keys [S, H, D] whose softmax is far from even."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(TEXT + IMAGE, HEADS, DIM, generator=generator) for _ in range(2))
    return scale * query, key


def naive(query: Tensor, key: Tensor, text: int, own: int, bias: Tensor | None = None) -> AttentionMass:
    """The whole matrix, in fp64."""
    logits = torch.einsum("qhd,khd->hqk", query.double(), key.double()) / math.sqrt(query.shape[-1])
    bias = torch.zeros(len(key)) if bias is None else bias
    weights = (logits + bias.double()).softmax(dim=-1)
    reading = bias.isfinite() & (torch.arange(len(key)) < text)
    groups = [torch.arange(len(key)) >= text, reading & (torch.arange(len(key)) < own)]
    groups.append(reading & (torch.arange(len(key)) >= own))
    rows = [weights[:, group].sum(dim=1) / max(1, int(group.sum())) for group in groups]
    on = torch.stack(rows)
    where = weights[:, text:, :text].mean(dim=0).T
    return AttentionMass(on[..., :text].float(), on[..., text:].sum(dim=-1).float(), where.float())


def worst(found: AttentionMass, wanted: AttentionMass) -> float:
    pairs = [(getattr(found, name), getattr(wanted, name)) for name in ("on_text", "on_image", "where")]
    assert all(one.dtype == torch.float32 for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize(("rows", "columns"), [(256, 1024), (7, 5), (1, 1), (61, 61)])
@pytest.mark.parametrize("own", [1, 12, TEXT])
def test_streamed_masses_are_those_of_the_whole_softmax(rows: int, columns: int, own: int) -> None:
    query, key = drawn()
    found = attention_mass(query, key, text=TEXT, own=own, rows=rows, columns=columns)
    assert worst(found, naive(query, key, TEXT, own)) < 1e-5
    whole = found.on_text.sum(dim=-1) + found.on_image
    groups = slice(0, 3 if own < TEXT else 2)
    assert (whole[groups] - 1).abs().max() < 1e-6
    if own == TEXT:
        assert not found.on_text[2].any()
    assert float(found.where.mean(dim=1).sub(found.on_text[0].mean(dim=0)).abs().max()) < 1e-6


def test_masked_keys_get_exactly_nothing_and_do_not_read() -> None:
    query, key = drawn()
    bias = torch.zeros(TEXT + IMAGE)
    bias[9:TEXT] = -math.inf
    key[9:TEXT] *= 1e4  # what is hidden may be anything
    found = attention_mass(query, key, text=TEXT, own=6, bias=bias, rows=5, columns=11)
    assert worst(found, naive(query, key, TEXT, 6, bias)) < 1e-5
    assert not found.on_text[..., 9:].any()
    assert not found.where[9:].any()
    short = [torch.cat([each[:9], each[TEXT:]]) for each in (query, key)]
    trimmed = attention_mass(*short, text=9, own=6)
    assert float((trimmed.on_text - found.on_text[..., :9]).abs().max()) < 1e-6


def test_a_bias_is_added_to_the_logits() -> None:
    query, key = drawn()
    bias = torch.cat([torch.ones(6), torch.zeros(TEXT - 6), torch.ones(IMAGE)])
    found = attention_mass(query, key, text=TEXT, own=6, bias=bias, rows=9)
    assert worst(found, naive(query, key, TEXT, 6, bias)) < 1e-5
    assert (
        worst(attention_mass(query, key, text=TEXT, own=6, bias=torch.ones(len(key))), naive(query, key, TEXT, 6))
        < 1e-5
    )


def test_logits_of_any_size_stay_finite() -> None:
    query, key = drawn(scale=1e4)
    found = attention_mass(query, key, text=TEXT, own=6, rows=8, columns=8)
    assert worst(found, naive(query, key, TEXT, 6)) < 1e-5


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has that is made in the block."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.most = max(self.most, one.numel())
        return out


def test_flux_size_holds_no_matrix_of_all_queries_by_all_keys() -> None:
    """1024 pixels and 512 text tokens: 4608 tokens, 24 heads of 128. A matrix of all would take 2 GB in fp32."""
    query, key = (torch.empty(4608, 24, 128, device="meta", dtype=torch.bfloat16) for _ in range(2))
    with Largest() as counted:
        attention_mass(query, key, text=512, own=512)
    assert counted.most == 4608 * 24 * 128  # the queries themselves
    assert counted.most < 24 * 4608 * 4608 / 30


def recorded(transformer: Any, sample: int, own: int) -> tuple[Tensor, dict[int, AttentionMass]]:
    """The velocity of `run`, and the masses of one of its two samples, 3 and 7 tokens long."""
    found: dict[int, AttentionMass] = {}
    with attention_masses(transformer, found.__setitem__, sample=sample, text=7, own=own):
        return run(transformer), found


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_velocity_has_the_same_bits_beside_a_record(base: str, adapters: bool) -> None:
    transformer = based(base)
    if adapters:
        adapted(transformer)
    with torch.no_grad():
        plain = run(transformer)
        found, masses = recorded(transformer, 0, 3)
        assert run(transformer).equal(plain)
    assert found.equal(plain)
    assert sorted(masses) == list(range(len(masses)))
    assert len(masses) == len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("sample", "own"), [(0, 3), (1, 4)])
def test_masses_beside_a_pass_are_those_of_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, fused: bool, sample: int, own: int
) -> None:
    """The queries, keys and mask that reach the pass's own attention, through a naive softmax."""
    transformer = tiny_transformer()
    if fused:
        fuse_attention(transformer)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = transformer_flux.dispatch_attention_fn

    def kept(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **rest: Any) -> Any:
        seen.append((query[sample], key[sample], attn_mask[sample].flatten()))
        return attend(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", kept)
    monkeypatch.setattr("diffusers.models.attention_dispatch.dispatch_attention_fn", kept)
    with torch.no_grad():
        _, masses = recorded(transformer, sample, own)
    assert len(seen) == len(masses) == 3
    assert fused == any(isinstance(one, FusedAttnProcessor) for one in transformer.attn_processors.values())
    for number, (query, key, mask) in enumerate(seen):
        bias = torch.zeros(len(mask)).masked_fill(~mask, -math.inf)
        assert worst(masses[number], naive(query, key, 7, own, bias)) < 1e-5
        assert bool(masses[number].on_text[..., 3:].any()) == (sample == 1)


@pytest.mark.parametrize("sample", [0, 1])
def test_a_bias_of_the_pass_is_that_of_its_sample(monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    """Two prompts of padding `bias`, of 3 and 5 own tokens among 7."""
    transformer, generator = tiny_transformer(), torch.Generator().manual_seed(5)
    tokens = [torch.randn(7, 24, generator=generator) for _ in range(2)]
    text = TextConditioning(tokens, torch.randn(2, 16, generator=generator), [3, 5])
    packed, sigma = torch.randn(2, 24, 64, generator=generator), torch.full((2,), 0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    attend = transformer_flux.dispatch_attention_fn

    def kept(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **rest: Any) -> Any:
        seen.append((query[sample], key[sample]))
        return attend(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", kept)
    found: dict[int, AttentionMass] = {}
    own = [3, 5][sample]
    with torch.no_grad(), attention_masses(transformer, found.__setitem__, sample=sample, text=7, own=own):
        velocity(transformer, packed, sigma, text, image_ids(8, 12))
    bias = torch.ones(7 + 24)
    bias[own:7] = 0
    assert len(seen) == len(found) == 3
    for number, (query, key) in enumerate(seen):
        assert worst(found[number], naive(query, key, 7, own, bias)) < 1e-5
        assert worst(found[number], naive(query, key, 7, own)) > 1e-3


def test_a_record_ends_with_its_block_whatever_happens() -> None:
    transformer = tiny_transformer()
    before = dict(transformer.attn_processors)

    def fail(number: int, mass: AttentionMass) -> None:
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"), attention_masses(transformer, fail, sample=0, text=7, own=3):
        run(transformer)
    assert transformer.attn_processors == before


def test_a_token_that_is_forced_to_be_attended_shows() -> None:
    """In the double block all queries point one way, and of all keys the third text token's alone does too.

    The first numbers of a head are turned by no position: text and image have the same first coordinate.
    """
    transformer = tiny_transformer()
    generator = torch.Generator().manual_seed(3)
    text = TextConditioning([torch.randn(9, 24, generator=generator)], torch.randn(1, 16, generator=generator))
    packed = torch.randn(1, 24, 64, generator=generator)
    attention: Any = transformer.transformer_blocks[0].attn
    states: list[Tensor] = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(kwargs["encoder_hidden_states"][0]), with_kwargs=True
    )

    def masses() -> dict[int, AttentionMass]:
        found: dict[int, AttentionMass] = {}
        with torch.no_grad(), attention_masses(transformer, found.__setitem__, sample=0, text=9, own=6):
            velocity(transformer, packed, torch.tensor([0.5]), text, image_ids(8, 12))
        return found

    assert float(masses()[0].on_text[0, :, 2].max()) < 0.3
    way = torch.zeros(2, 16)
    way[:, 0] = 1.0
    planted = states[0][2] - states[0].mean(dim=0)
    along = (states[0] - states[0].mean(dim=0)) @ planted
    limit = (along.topk(2).values.mean() + states[0].mean(dim=0) @ planted).item()
    with torch.no_grad():
        for layer in (attention.to_q, attention.add_q_proj):
            layer.weight.zero_()
            layer.bias.copy_(way.flatten())
        attention.to_k.weight.zero_()
        attention.to_k.bias.copy_(-way.flatten())
        attention.add_k_proj.weight.copy_(torch.outer(way.flatten(), planted))
        attention.add_k_proj.bias.copy_(-limit * way.flatten())
        for norm in (attention.norm_k, attention.norm_added_k):
            norm.weight.fill_(4.0)
    found = masses()[0]
    assert float(found.on_text[:, :, 2].min()) > 0.99
    assert float(found.where[2].min()) > 0.99
    assert READERS == ("image", "own", "padding")
