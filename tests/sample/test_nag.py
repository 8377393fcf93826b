"""Guidance within attention: the equations on known numbers, FLUX's blocks against them, and what is neutral."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.errors import ModelError, OptionError
from libreflux.flow.guidance import nag
from libreflux.model import latents
from libreflux.model.attention_guidance import normalized_attention
from libreflux.model.attention_record import queries_and_keys
from libreflux.model.compiling import CompiledBlocks
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from libreflux.sample.first_steps import FirstSteps
from libreflux.sample.noise import start
from libreflux.sample.pipeline import LibreFluxPipeline
from libreflux.sample.rules import GuidanceRule, Nag
from opened import tensor_of
from tiny import tiny_transformer

SCALE, TAU, ALPHA = 3.0, 1.25, 0.5
LONG, SHORT = "a small green frog sits under a tall tree", "a fox"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_known_numbers_below_the_cap() -> None:
    positive, negative = torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])
    # Z~ = (2, 2) + 1 (1, -1) = (3, 1), of the same L1 norm.
    assert nag(positive, negative, 1.0, 2.0, 1.0).tolist() == [[[3.0, 1.0]]]
    assert nag(positive, negative, 1.0, 2.0, 0.5).tolist() == [[[2.5, 1.5]]]


def test_the_cap_is_reached_exactly() -> None:
    positive, negative = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[-1.0, 1.0]]])
    # Z~ = (1 + 7 * 2, 1): its norm, 16, is 8 times that of Z+, and is cut to twice.
    assert nag(positive, negative, 7.0, 2.0, 1.0).tolist() == [[[3.75, 0.25]]]


@pytest.mark.parametrize("options", [(0.0, 2.5, 1.0), (4.0, 2.5, 0.0)])
def test_neutral_numbers_leave_attention(options: tuple[float, float, float]) -> None:
    positive = drawn(2, 3, 8)
    assert torch.equal(nag(positive, drawn(2, 3, 8, seed=1), *options), positive)


def test_attention_of_nothing_stays_nothing() -> None:
    assert nag(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), 4.0, 2.5, 1.0).tolist() == [[[0.0, 0.0]]]


def text(lengths: list[int], seed: int) -> TextConditioning:
    return TextConditioning([drawn(n, 24, seed=seed + n) for n in lengths], drawn(len(lengths), 16, seed=seed))


def attention(attn: Any, image: Tensor, words: Tensor | None, rotary: Any) -> Tensor:
    """What attention gives before it is projected, [B, S, C], by the plain formula."""
    query, key = queries_and_keys(attn, image, words, rotary)
    value = attn.to_v(image)
    if words is not None:
        value = torch.cat([attn.add_v_proj(words), value], dim=1)
    heads = value.unflatten(-1, (attn.heads, -1))
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, heads).flatten(2)


def naive(model: Any, x: Tensor, sigma: Tensor, positive: TextConditioning, negative: TextConditioning) -> Tensor:
    """The equations with two streams of text, written out, for one sample."""
    image, time = model.x_embedder(x), 1000 * sigma
    tembs = [model.time_text_embed(time, side.pooled) for side in (positive, negative)]
    words = [model.context_embedder(side.tokens[0][None]) for side in (positive, negative)]
    ids = latents.image_ids(8, 8, device="cpu")
    rotary = [model.pos_embed(torch.cat([torch.zeros(side.shape[1], 3), ids])) for side in words]
    for block in model.transformer_blocks:
        normed, gate, shift, scale, gate_mlp = block.norm1(image, emb=tembs[0])
        found, modulations = [], []
        for side, temb, turned in zip(words, tembs, rotary, strict=True):
            modulations.append(block.norm1_context(side, emb=temb))
            found.append(attention(block.attn, normed, modulations[-1][0], turned))
        guided = nag(found[0][:, -16:], found[1][:, -16:], SCALE, TAU, ALPHA)
        image = image + gate.unsqueeze(1) * block.attn.to_out[0](guided)
        image = image + gate_mlp.unsqueeze(1) * block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
        for which, (_, its, moved, sized, last) in enumerate(modulations):
            side = words[which] + its.unsqueeze(1) * block.attn.to_add_out(found[which][:, :-16])
            inner = block.norm2_context(side) * (1 + sized[:, None]) + moved[:, None]
            words[which] = side + last.unsqueeze(1) * block.ff_context(inner)
    for block in model.single_transformer_blocks:
        streams = [torch.cat([side, image], dim=1) for side in words]
        normed = [block.norm(stream, emb=tembs[0]) for stream in streams]
        found = [attention(block.attn, one, None, turned) for (one, _), turned in zip(normed, rotary, strict=True)]
        guided = nag(found[0][:, -16:], found[1][:, -16:], SCALE, TAU, ALPHA)
        for which, ((one, gate), stream) in enumerate(zip(normed, streams, strict=True)):
            attended = torch.cat([found[which][:, :-16], guided], dim=1)
            mixed = torch.cat([attended, block.act_mlp(block.proj_mlp(one))], dim=2)
            streams[which] = stream + gate.unsqueeze(1) * block.proj_out(mixed)
        words, image = [stream[:, :-16] for stream in streams], streams[0][:, -16:]
    result: Tensor = model.proj_out(model.norm_out(image, tembs[0]))
    return result


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    return tiny_transformer()


def guided_velocity(
    model: FluxTransformer2DModel, x: Tensor, positive: TextConditioning, negative: TextConditioning
) -> Tensor:
    ids, sigma = latents.image_ids(8, 8, device="cpu"), torch.full((2 * len(x),), 0.6)
    with torch.no_grad(), normalized_attention(model, image_tokens=16, scale=SCALE, tau=TAU, alpha=ALPHA):
        found = velocity(model, torch.cat([x, x]), sigma, TextConditioning.cat([negative, positive]), ids)
    return found.chunk(2)[1]


def test_fluxs_blocks_agree_with_the_equations_written_out(transformer: FluxTransformer2DModel) -> None:
    x, positive, negative = drawn(1, 16, 64), text([5], 10), text([3], 20)
    found = guided_velocity(transformer, x, positive, negative)
    with torch.no_grad():
        expected = naive(transformer, x, torch.tensor([0.6]), positive, negative)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_sample_is_the_same_in_a_batch_of_ragged_text(transformer: FluxTransformer2DModel) -> None:
    x, positive, negative = drawn(2, 16, 64), text([5, 2], 10), text([3, 7], 20)
    both = guided_velocity(transformer, x, positive, negative)
    one = guided_velocity(transformer, x[1:], positive.index([1]), negative.index([1]))
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-4)


def test_nothing_stays_behind(transformer: FluxTransformer2DModel) -> None:
    guided_velocity(transformer, drawn(1, 16, 64), text([5], 10), text([3], 20))
    assert not any(module._forward_hooks for module in transformer.modules())


def test_compiled_blocks_are_refused() -> None:
    model = tiny_transformer()
    CompiledBlocks(model, backend="aot_eager")
    with pytest.raises(ModelError, match="compiled blocks cannot be guided by attention"):
        guided_velocity(model, drawn(1, 16, 64), text([5], 10), text([3], 20))


def latent(pipe: LibreFluxPipeline, prompt: str | list[str] = LONG, **options: Any) -> Tensor:
    common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "seeds": 3, "output_type": "latent"}
    return tensor_of(pipe(prompt, options.pop("negative", SHORT), **{**common, **options}))


def test_a_scale_of_0_is_plain_drawing_to_the_bit(pipe: LibreFluxPipeline) -> None:
    assert torch.equal(latent(pipe, nag=Nag(nag=0.0)), latent(pipe))


def test_the_negative_prompt_works_without_a_guidance_scale(pipe: LibreFluxPipeline) -> None:
    guided = latent(pipe, nag=Nag(nag=4.0))
    assert not torch.equal(guided, latent(pipe))
    assert not torch.equal(guided, latent(pipe, nag=Nag(nag=4.0), negative=""))


def test_both_kinds_of_guidance_at_once_are_guidance_of_nags_velocity_and_the_plain_one(
    pipe: LibreFluxPipeline,
) -> None:
    """In one step latents are noise less velocity, so that they are guided as velocities are."""
    one: dict[str, Any] = {"num_inference_steps": 1}
    within, negative = latent(pipe, nag=Nag(nag=4.0), **one), latent(pipe, SHORT, **one)
    both = latent(pipe, nag=Nag(nag=4.0), guidance_scale=3.0, **one)
    torch.testing.assert_close(both, negative + 3 * (within - negative), atol=1e-4, rtol=1e-4)


def test_a_step_that_stands_still_leaves_the_noise_to_the_next(pipe: LibreFluxPipeline) -> None:
    rule = GuidanceRule(guidance_rule="cfg-zero", zero_init=1)
    still = latent(pipe, guidance_scale=3.0, guidance_rule=rule, sigmas=[1.0, 0.5], num_inference_steps=None)
    side = pipe.default_size // latents.stride(pipe.vae)
    noise, _ = start(None, 3, None, (1, int(pipe.vae.config.latent_channels), side, side))
    rest: dict[str, Any] = {
        "guidance_rule": GuidanceRule(guidance_rule="cfg-zero"),
        "sigmas": [0.5],
        "num_inference_steps": None,
    }
    assert torch.equal(still, latent(pipe, guidance_scale=3.0, latents=noise, seeds=None, **rest))


def test_apgs_momentum_begins_with_the_second_step(pipe: LibreFluxPipeline) -> None:
    rules = [GuidanceRule(guidance_rule="apg", apg_momentum=momentum) for momentum in (-0.5, 0.0)]
    one, two = (
        [latent(pipe, guidance_scale=3.0, guidance_rule=rule, num_inference_steps=steps) for rule in rules]
        for steps in (1, 2)
    )
    assert torch.equal(*one)
    assert not torch.equal(*two)


def test_batch_and_single_pictures_agree(pipe: LibreFluxPipeline) -> None:
    both = latent(pipe, [SHORT, LONG], nag=Nag(nag=4.0), negative="", seeds=[3, 4])
    torch.testing.assert_close(both[1:], latent(pipe, nag=Nag(nag=4.0), negative="", seeds=4), atol=1e-4, rtol=0)


def first(pipe: LibreFluxPipeline, steps: int, transformer: Any = None, **options: Any) -> FirstSteps:
    return FirstSteps(
        transformer=transformer or pipe.transformer, steps=steps, positive=pipe.encode_prompt(LONG), **options
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_first_steps_by_none_or_by_the_model_itself_are_plain_to_the_bit(pipe: LibreFluxPipeline, steps: int) -> None:
    assert torch.equal(latent(pipe, first_steps=first(pipe, steps)), latent(pipe))


def test_first_steps_are_guided_by_their_own_scale_to_the_bit(pipe: LibreFluxPipeline) -> None:
    own = first(pipe, 1, scale=3.0, negative=pipe.encode_prompt(SHORT))
    expected = latent(pipe, guidance_scale=3.0, guidance_stop=0.5)  # the first of two steps
    assert torch.equal(latent(pipe, first_steps=own), expected)


def test_another_model_draws_the_first_steps(pipe: LibreFluxPipeline) -> None:
    other = first(pipe, 1, tiny_transformer(seed=5))
    assert not torch.equal(latent(pipe, first_steps=other), latent(pipe))


def test_guided_first_steps_without_a_negative_prompt_are_refused(pipe: LibreFluxPipeline) -> None:
    with pytest.raises(OptionError, match="guidance 3 needs a negative prompt"):
        first(pipe, 1, scale=3.0)


def test_a_number_that_the_rule_does_not_read_is_refused() -> None:
    with pytest.raises(OptionError, match="apg_eta: is read by `guidance_rule` apg alone"):
        GuidanceRule(apg_eta=0.5)


@pytest.mark.parametrize("steps", [-1, 2])
def test_first_steps_that_leave_none_are_refused(pipe: LibreFluxPipeline, steps: int) -> None:
    with pytest.raises(OptionError, match="leave none to the model"):
        latent(pipe, first_steps=first(pipe, steps))
