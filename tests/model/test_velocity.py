"""velocity(): against diffusers' own transformer with a bool mask, sample by sample, and inside bf16."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import ModelError
from libreflux.model.latents import image_ids
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from opened import Opened, opened
from tiny import tiny_transformer

IDS = image_ids(4, 6)  # 6 image tokens


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Opened:
    return opened(tiny_model_dir)


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    return tiny_transformer(seed=3)


def random_text(*lengths: int, seed: int = 0) -> TextConditioning:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(length, 24, generator=generator) for length in lengths]
    return TextConditioning(tokens, torch.randn(len(lengths), 16, generator=generator))


def random_packed(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, len(IDS), 64, generator=torch.Generator().manual_seed(seed))


def diffusers_velocity(
    transformer: FluxTransformer2DModel, packed: Tensor, sigma: Tensor, embeds: Tensor, mask: Tensor, pooled: Tensor
) -> Tensor:
    """diffusers called directly: padded text, bool mask over text then image."""
    seen = torch.cat([mask, mask.new_ones(len(mask), packed.shape[1])], dim=1)
    return transformer(
        hidden_states=packed,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=IDS,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        joint_attention_kwargs={"attention_mask": seen[:, None, None, :]},
        return_dict=False,
    )[0]


@pytest.mark.parametrize("length", [1, 20, 256, 512])
@pytest.mark.parametrize("padding", ["drop", "trim"])
def test_equals_padded_diffusers_with_a_bool_mask(model: Opened, padding: str, length: int) -> None:
    """From prompt to velocity and gradients: unpadded here; T5 and FLUX padded to 512 and masked there."""
    prompt = " ".join(["fox"] * (length - 1))
    ids = torch.tensor([model.text.tokenizer_2(prompt, padding="max_length", max_length=512).input_ids])
    mask = torch.arange(512)[None] < length
    assert (ids[0, :length] != 0).all()
    assert (ids[0, length:] == 0).all()
    with torch.no_grad():
        # drop: T5 does not see the padding (its own mask); trim: it does, as BFL runs it.
        t5_mask = mask.long() if padding == "drop" else torch.ones_like(ids)
        embeds = model.text.text_encoder_2(ids, attention_mask=t5_mask).last_hidden_state
    embeds[:, length:] = 1e3 * torch.randn(512 - length, 24)  # what a masked row holds must not matter
    text = model.text.encode([prompt], padding=padding, max_tokens=512)
    assert text.lengths == [length]

    packed, sigma = random_packed(1), torch.tensor([0.6])
    ours, theirs = copy.deepcopy(model.transformer), copy.deepcopy(model.transformer)
    ours.requires_grad_(True), theirs.requires_grad_(True)
    x_ours, x_theirs = packed.clone().requires_grad_(), packed.clone().requires_grad_()
    v = velocity(ours, x_ours, sigma, text, IDS)
    expected = diffusers_velocity(theirs, x_theirs, sigma, embeds, mask, text.pooled)
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)
    unmasked = diffusers_velocity(theirs, packed, sigma, embeds, torch.ones_like(mask), text.pooled)
    assert length == 512 or (unmasked - expected).abs().max() > 0.01  # the comparison can tell

    v.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.grad is None and b.grad is None:
            continue
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0, msg=functools.partial("{}: {}".format, name))


def original_float_mask_velocity(
    transformer: FluxTransformer2DModel, packed: Tensor, sigma: Tensor, embeds: Tensor, mask: Tensor, pooled: Tensor
) -> Tensor:
    """The mask cast to the hidden states' dtype: attention then *adds* 1 to what is seen, and hides nothing."""
    return diffusers_velocity(transformer, packed, sigma, embeds, mask.to(embeds.dtype), pooled)


@torch.no_grad()
def test_padding_is_not_read_where_a_float_mask_only_weighs_it_down(transformer: FluxTransformer2DModel) -> None:
    """A prompt of 5 tokens padded to 20, by its neighbour in our batch and by two kinds of padding in diffusers."""
    text, packed, sigma = random_text(5, 20), random_packed(2), torch.tensor([0.6, 0.6])
    ours = velocity(transformer, packed, sigma, text, IDS)[:1]
    mask = torch.arange(20)[None] < 5
    for route, masks in ((diffusers_velocity, True), (original_float_mask_velocity, False)):
        for padding in (torch.zeros(15, 24), random_text(15, seed=9).tokens[0]):
            embeds = torch.cat([text.tokens[0], padding])[None]
            found = route(transformer, packed[:1], sigma[:1], embeds, mask, text.pooled[:1])
            assert torch.allclose(found, ours, atol=1e-5, rtol=0) == masks
            assert masks or (found - ours).abs().max() > 0.01


def test_ragged_batch_is_its_samples_one_by_one(transformer: FluxTransformer2DModel) -> None:
    text, packed = random_text(1, 7, 20, 3), random_packed(4)
    sigma = torch.tensor([0.05, 0.4, 0.7, 1.0])
    together = velocity(transformer, packed, sigma, text, IDS)
    for i in range(4):
        alone = velocity(transformer, packed[i : i + 1], sigma[i : i + 1], text.index([i]), IDS)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_ragged_gradients_are_the_sum_of_single_ones(transformer: FluxTransformer2DModel) -> None:
    text, packed, sigma = random_text(2, 9), random_packed(2), torch.tensor([0.3, 0.8])
    apart = copy.deepcopy(transformer)
    velocity(transformer, packed, sigma, text, IDS).square().sum().backward()
    for i in range(2):
        velocity(apart, packed[i : i + 1], sigma[i : i + 1], text.index([i]), IDS).square().sum().backward()
    scale = max(p.grad.abs().max() for p in apart.parameters())
    for a, b in zip(transformer.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad / scale, b.grad / scale, atol=1e-5, rtol=0)


def test_text_is_a_set(transformer: FluxTransformer2DModel) -> None:
    text, packed, sigma = random_text(12), random_packed(1), torch.tensor([0.5])
    shuffled = TextConditioning([text.tokens[0][torch.randperm(12)]], text.pooled)
    v = velocity(transformer, packed, sigma, text, IDS)
    torch.testing.assert_close(velocity(transformer, packed, sigma, shuffled, IDS), v, atol=1e-5, rtol=0)
    other = random_text(12, seed=1)
    assert (velocity(transformer, packed, sigma, other, IDS) - v).abs().max() > 0.01


def test_no_mask_when_lengths_agree(transformer: FluxTransformer2DModel) -> None:
    masks: list[Tensor | None] = []

    def spy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.append((kwargs["joint_attention_kwargs"] or {}).get("attention_mask"))

    transformer.register_forward_pre_hook(spy, with_kwargs=True)
    velocity(transformer, random_packed(2), torch.tensor([0.1, 0.2]), random_text(5, 5), IDS)
    velocity(transformer, random_packed(2), torch.tensor([0.1, 0.2]), random_text(5, 3), IDS)
    assert masks[0] is None
    assert masks[1] is not None
    assert masks[1].dtype == torch.bool
    assert masks[1].shape == (2, 1, 1, 5 + len(IDS))
    assert masks[1][:, 0, 0].sum(dim=1).tolist() == [5 + len(IDS), 3 + len(IDS)]
    assert masks[1][1, 0, 0, 3:5].sum() == 0  # text first


SIGMAS = 0.5 + torch.arange(2000) / 4096  # 2000 neighbours in [0.5, 1): all exact in fp32, 64 or so in bf16


def seen_by_time_proj(transformer: FluxTransformer2DModel, call: Callable[[], object]) -> Tensor:
    """What reaches the sinusoidal embedding of the timestep."""
    seen: list[Tensor] = []
    handle = transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("route", ["bf16 weights", "bf16 autocast"])
def test_neighbouring_sigmas_stay_distinct(transformer: FluxTransformer2DModel, route: str) -> None:
    if route == "bf16 weights":
        transformer.to(torch.bfloat16)
    batch = len(SIGMAS)
    packed, text = torch.zeros(batch, 1, 64), TextConditioning([torch.zeros(1, 24)] * batch, torch.zeros(batch, 16))
    ids = IDS[:1]

    def ours() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=route == "bf16 autocast"):
            v = velocity(transformer, packed, SIGMAS, text, ids)
        assert v.dtype == torch.float32

    def original_timestep() -> None:
        """diffusers' own path: sigma is cast to the hidden states' dtype, unlike the noise that it stands for."""
        dtype = transformer.dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=route == "bf16 autocast"):
            transformer(
                hidden_states=packed.to(dtype),
                encoder_hidden_states=torch.zeros(batch, 1, 24, dtype=dtype),
                pooled_projections=text.pooled.to(dtype),
                timestep=SIGMAS,
                img_ids=ids,
                txt_ids=torch.zeros(1, 3),
            )

    before = seen_by_time_proj(transformer, original_timestep)
    arrived = seen_by_time_proj(transformer, ours)
    after = seen_by_time_proj(transformer, original_timestep)
    assert arrived.dtype == torch.float32
    assert torch.equal(arrived, 1000 * SIGMAS)
    # The same count by diffusers' own path fails, before and after: our hook acts in our call only.
    assert before.dtype == after.dtype == torch.bfloat16
    assert torch.equal(before, after)
    assert len(before.unique()) < 130 < len(arrived.unique()) == batch


def test_sigma_changes_the_velocity_below_bf16_resolution(transformer: FluxTransformer2DModel) -> None:
    transformer.to(torch.bfloat16)
    text, packed = random_text(3), random_packed(1)
    a, b = (velocity(transformer, packed, torch.tensor([s]), text, IDS) for s in (0.7001, 0.7011))
    assert not torch.equal(a, b)


def test_hooks_do_not_pile_up_and_survive_copies(transformer: FluxTransformer2DModel) -> None:
    text, packed, sigma = random_text(3), random_packed(1), torch.tensor([0.7001])
    first = velocity(transformer, packed, sigma, text, IDS)
    for each in (transformer, copy.deepcopy(transformer)):
        assert torch.equal(velocity(each, packed, sigma, text, IDS), first)
        assert len(each.time_text_embed._forward_pre_hooks) == 1


def test_an_error_inside_leaves_nothing_behind(transformer: FluxTransformer2DModel) -> None:
    text, packed = random_text(3), random_packed(1)
    plain = lambda: diffusers_velocity(  # noqa: E731
        transformer, packed, torch.tensor([0.2]), text.tokens[0][None], torch.ones(1, 3, dtype=torch.bool), text.pooled
    )
    expected = plain()
    with pytest.raises(RuntimeError):
        velocity(transformer, packed[..., :60], torch.tensor([0.9]), text, IDS)
    assert torch.equal(plain(), expected)


def test_threads_do_not_share_a_sigma(transformer: FluxTransformer2DModel) -> None:
    text, packed = random_text(3), random_packed(1)
    sigmas = [0.1, 0.9]
    expected = [velocity(transformer, packed, torch.tensor([s]), text, IDS) for s in sigmas]
    wrong: list[float] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(40):
            with torch.no_grad():
                v = velocity(transformer, packed, torch.tensor([sigmas[i]]), text, IDS)
            if (v - expected[i]).abs().max() > 1e-4:
                wrong.append(sigmas[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert wrong == []


def test_gradient_checkpointing_changes_nothing(transformer: FluxTransformer2DModel) -> None:
    text, packed, sigma = random_text(3, 8), random_packed(2), torch.tensor([0.3, 0.7])
    plain = copy.deepcopy(transformer)
    transformer.enable_gradient_checkpointing()
    transformer.train(), plain.train()
    a, b = (velocity(t, packed, sigma, text, IDS) for t in (transformer, plain))
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    for p, q in zip(transformer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_weights_dtype_ignores_fp32_adapters_on_the_first_linear(transformer: FluxTransformer2DModel) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.delta = torch.nn.Parameter(torch.zeros(base.out_features, base.in_features))
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + torch.nn.functional.linear(x, self.delta.to(x.dtype))

    transformer.to(torch.bfloat16)
    text, packed, sigma = random_text(3), random_packed(1), torch.tensor([0.5])
    expected = velocity(transformer, packed, sigma, text, IDS)
    embedder = transformer.time_text_embed.timestep_embedder
    embedder.linear_1 = Adapted(embedder.linear_1)
    transformer.x_embedder = Adapted(transformer.x_embedder)
    assert torch.equal(velocity(transformer, packed, sigma, text, IDS), expected)


def test_embedded_guidance() -> None:
    dev = tiny_transformer(guidance_embeds=True)
    text, packed, sigma = random_text(4), random_packed(1), torch.tensor([0.5])
    v = velocity(dev, packed, sigma, text, IDS, guidance=3.5)
    expected = dev(
        hidden_states=packed,
        encoder_hidden_states=text.tokens[0][None],
        pooled_projections=text.pooled,
        timestep=sigma,
        guidance=torch.tensor([3.5]),
        img_ids=IDS,
        txt_ids=torch.zeros(4, 3),
    ).sample
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)
    assert (velocity(dev, packed, sigma, text, IDS, guidance=1.0) - v).abs().max() > 1e-3
    with pytest.raises(ModelError, match="needs an embedded guidance"):
        velocity(dev, packed, sigma, text, IDS)
    with pytest.raises(ModelError, match="no guidance embedding"):
        velocity(tiny_transformer(), packed, sigma, text, IDS, guidance=3.5)


def test_disagreeing_batches_are_refused(transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(ModelError, match="do not agree"):
        velocity(transformer, random_packed(2), torch.tensor([0.5]), random_text(3, 3), IDS)
    with pytest.raises(ModelError, match="do not agree"):
        velocity(transformer, random_packed(2), torch.tensor([0.5, 0.5]), random_text(3), IDS)
