"""The flow-matching loss against its formula on a real tiny transformer; the noise as a function of its key."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model.latents import pack
from libreflux.model.text import TextConditioning
from libreflux.training.objective import NoisedBatch, flow_matching_loss, keyed_noise
from tiny import tiny_transformer

LENGTHS = [3, 7, 7, 1]


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    return tiny_transformer()


def _batch(lengths: list[int] = LENGTHS) -> NoisedBatch:
    count = len(lengths)
    generator = torch.Generator().manual_seed(5)
    return NoisedBatch(
        torch.randn(count, 16, 4, 6, generator=generator),
        torch.randn(count, 16, 4, 6, generator=generator),
        torch.linspace(0.1, 0.9, count),
        TextConditioning(
            [torch.randn(length, 24, generator=generator) for length in lengths],
            torch.randn(count, 16, generator=generator),
        ),
    )


def _seen_and_given(transformer: FluxTransformer2DModel, batch: NoisedBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per sample: what the transformer was shown, what it answered, and the loss."""
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, kwargs: dict[str, Tensor], output: tuple[Tensor]) -> None:
        kept.extend((kwargs["hidden_states"], output[0]))

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        losses = flow_matching_loss(transformer, batch)
    hook.remove()
    yield from zip(*kept, losses, strict=True)


def test_loss_is_the_mean_squared_velocity_error_of_each_picture(transformer: FluxTransformer2DModel) -> None:
    batch = _batch()
    for i, (x_sigma, answer, loss) in enumerate(_seen_and_given(transformer, batch)):
        x0, noise, sigma = batch.latents[i].double(), batch.noise[i].double(), float(batch.sigma[i])
        wanted_x = pack(((1 - sigma) * x0 + sigma * noise)[None])[0]
        wanted = (answer.double() - pack((noise - x0)[None])[0]).square().mean()
        torch.testing.assert_close(x_sigma.double(), wanted_x, atol=1e-6, rtol=0)
        torch.testing.assert_close(loss.double(), wanted, atol=0, rtol=1e-6)
        assert answer.abs().max() > 0.05  # the network does say something


def test_a_ragged_batch_is_its_pictures_one_by_one(transformer: FluxTransformer2DModel) -> None:
    batch = _batch()
    with torch.no_grad():
        together = flow_matching_loss(transformer, batch)
        alone = torch.cat([flow_matching_loss(transformer, batch.index([i])) for i in range(len(LENGTHS))])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 1e-3  # different pictures, different losses: order would be noticed


def test_the_gradient_is_the_slope_of_the_loss(transformer: FluxTransformer2DModel) -> None:
    """Central differences in fp64 along a random direction."""
    model = copy.deepcopy(transformer).double()
    batch = _batch()
    batch = replace(
        batch, latents=batch.latents.double(), noise=batch.noise.double(), text=batch.text.to(dtype=torch.float64)
    )
    weight = model.transformer_blocks[0].attn.to_q.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(flow_matching_loss(model, batch).sum(), weight)
    slope = 0.0
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * 1e-3 * direction
            slope += sign * float(flow_matching_loss(model, batch).sum()) / 2e-3
            weight -= sign * 1e-3 * direction
    assert abs(slope) > 1e-4
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_bf16_is_only_in_the_network(transformer: FluxTransformer2DModel) -> None:
    """The loss of a bf16 network keeps fp32 resolution: neighbouring fp32 latents give different losses."""
    model = copy.deepcopy(transformer).bfloat16()
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)  # it predicts exactly 0, so the loss is mean (noise - x0)²
    batch = _batch()
    with torch.no_grad():
        loss = flow_matching_loss(model, batch)
    assert loss.dtype == torch.float32
    wanted = (batch.noise.double() - batch.latents.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), wanted, atol=0, rtol=1e-6)


def test_guidance_goes_to_networks_that_embed_it_and_to_no_other(transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(ModelError):
        flow_matching_loss(transformer, replace(_batch(), guidance=1.0))
    guided = tiny_transformer(guidance_embeds=True)
    with pytest.raises(ModelError):
        flow_matching_loss(guided, _batch())
    with torch.no_grad():
        assert not torch.equal(
            flow_matching_loss(guided, replace(_batch(), guidance=1.0)),
            flow_matching_loss(guided, replace(_batch(), guidance=4.0)),
        )


def test_noise_is_a_function_of_its_key_and_of_nothing_else() -> None:
    torch.manual_seed(0)
    first = keyed_noise((16, 4, 4), 7, "picture", 3)
    torch.manual_seed(1)
    torch.randn(100)
    assert torch.equal(first, keyed_noise((16, 4, 4), 7, "picture", 3))
    others = [(8, "picture", 3), (7, "pictures", 3), (7, "picture", 4)]
    assert not any(torch.equal(first, keyed_noise((16, 4, 4), *key)) for key in others)


def test_noise_is_standard_normal_and_independent_between_keys() -> None:
    draws = torch.stack([keyed_noise((16, 8, 8), 0, "p", i) for i in range(200)]).flatten(1)
    count = draws.numel()
    assert abs(float(draws.mean())) < 5 / count**0.5
    assert abs(float(draws.var()) - 1) < 5 * (2 / count) ** 0.5
    neighbours = (draws[1:] * draws[:-1]).mean()
    assert abs(float(neighbours)) < 5 / count**0.5
