"""What each layer does: angles against their definition, gradients against autograd, a redundant block is found."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from libreflux.adapter.layers import linears
from libreflux.data.batches import Batch
from libreflux.flow.path import interpolate, velocity_target
from libreflux.model.features import image_features
from libreflux.model.finite import NotFiniteError
from libreflux.model.hidden_states import hidden_states
from libreflux.model.int8 import dequantise_model, quantise_model
from libreflux.model.text import TextConditioning
from libreflux.probing.held_out import model_velocity
from libreflux.probing.layer_gradients import squared_gradients, squared_norm
from libreflux.probing.layer_shares import block_of, shares
from libreflux.probing.layers import SPANS, block_distances, measure_layers
from libreflux.probing.metrics.angles import angular_distance, centred
from libreflux.probing.metrics.measures import paired_noise
from libreflux.probing.report.layers_page import headline, page
from tiny import tiny_transformer

SIGMAS = (0.3, 0.8)


class Pictures:
    """Random latents with random prompts of several lengths, as `HeldOut` gives them."""

    def __init__(self, count: int = 3, side: int = 4) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[Batch]:
        assert size == 1
        for number in range(self.count):
            draw = torch.Generator().manual_seed(number)
            text = TextConditioning([torch.randn(3 + number, 24, generator=draw)], torch.randn(1, 16, generator=draw))
            latents = torch.randn(1, 16, self.side, self.side, generator=draw)
            yield Batch(latents, text, (f"picture {number}",), ("",), (0,), torch.ones(1), (False,))


def without(transformer: FluxTransformer2DModel, block: int) -> FluxTransformer2DModel:
    """The block's gates closed: it gives what it is given."""
    width = transformer.inner_dim
    with torch.no_grad():
        if block < len(transformer.transformer_blocks):
            layers = [transformer.transformer_blocks[block].norm1, transformer.transformer_blocks[block].norm1_context]
            gates = [slice(2 * width, 3 * width), slice(5 * width, 6 * width)]
        else:
            layers = [transformer.single_transformer_blocks[block - len(transformer.transformer_blocks)].norm]
            gates = [slice(2 * width, 3 * width)]
        for layer in layers:
            for gate in gates:
                layer.linear.weight[gate] = 0
                layer.linear.bias[gate] = 0
    return transformer


def deeper(seed: int = 0) -> FluxTransformer2DModel:
    """2 double and 3 single blocks."""
    torch.manual_seed(seed)
    config = {**tiny_transformer().config, "num_layers": 2, "num_single_layers": 3}
    return FluxTransformer2DModel.from_config(config).requires_grad_(False).eval()


def test_the_angle_of_the_same_is_zero_of_the_opposite_one_and_scale_does_not_matter() -> None:
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    across = torch.zeros(2, 2)
    across[0, 0], across[1, 1] = 3.0, 0.5
    assert torch.equal(angular_distance(x, x), torch.zeros(5, 7))
    assert torch.equal(angular_distance(x, 4 * x), torch.zeros(5, 7))
    assert torch.allclose(angular_distance(x, 1e20 * x), torch.zeros(5, 7), atol=1e-6)
    assert torch.allclose(angular_distance(x, -3 * x), torch.ones(5, 7), atol=1e-6)
    assert float(angular_distance(across[0], across[1])) == pytest.approx(0.5, abs=1e-7)
    assert torch.equal(angular_distance(torch.zeros(4), torch.zeros(4)), torch.zeros(()))
    assert float(angular_distance(torch.zeros(4), torch.ones(4))) == pytest.approx(0.5)


def test_angles_are_those_of_the_definition_and_small_ones_too() -> None:
    """Against arccos in fp64; in fp32 it takes every angle below 3e-4 for zero."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 32, generator=draw), torch.randn(9, 32, generator=draw)
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    assert torch.allclose(angular_distance(x, y).double(), cosine.arccos() / math.pi, atol=1e-6)
    turned = torch.tensor([math.cos(1e-5), math.sin(1e-5)])
    assert float(angular_distance(torch.tensor([1.0, 0.0]), turned)) == pytest.approx(1e-5 / math.pi, rel=1e-3)


def test_centring_takes_away_what_all_tokens_share() -> None:
    x, y = (torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    shared = torch.zeros(16)
    shared[0] = 1000.0
    assert float(angular_distance(x + shared, y + shared).mean()) < 0.01
    assert float(angular_distance(centred(x + shared), centred(y + shared)).mean()) == pytest.approx(
        float(angular_distance(centred(x), centred(y)).mean()), abs=1e-4
    )
    assert float(angular_distance(centred(x), centred(y)).mean()) > 0.4


def states_of(transformer: FluxTransformer2DModel) -> tuple[list[tuple[Tensor, Tensor]], dict[int, Tensor]]:
    [batch] = Pictures(1).batches(1)
    field = model_velocity(transformer, batch.text)
    blocks = range(len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks))
    with torch.no_grad(), hidden_states(transformer) as states, image_features(transformer, list(blocks)) as features:
        field(batch.latents, torch.tensor([0.5]))
    return states, features


def test_states_are_what_blocks_are_given_and_make() -> None:
    transformer = deeper()
    states, features = states_of(transformer)
    assert [(tuple(text.shape), tuple(image.shape)) for text, image in states] == [((1, 3, 32), (1, 4, 32))] * 6
    for number, image in features.items():
        assert torch.equal(states[number + 1][1], image)
    [batch] = Pictures(1).batches(1)
    assert torch.allclose(states[0][0], transformer.context_embedder(batch.text.tokens[0][None]))
    assert not transformer.transformer_blocks[0]._forward_hooks
    assert not transformer.transformer_blocks[0]._forward_pre_hooks


def test_distances_are_those_of_a_naive_loop() -> None:
    states, _ = states_of(deeper())
    found = block_distances(states)
    assert set(found) == {(tokens, c, n) for tokens in ("text", "image") for c in (False, True) for n in (1, 2, 4)}
    for (tokens, is_centred, span), values in found.items():
        rows = [state[0 if tokens == "text" else 1][0].double() for state in states]
        rows = [row - row.mean(0) for row in rows] if is_centred else rows
        assert len(values) == len(states) - span
        for first, value in enumerate(values.tolist()):
            if tokens == "text" and first == len(values) - 1:
                assert math.isnan(value)
                continue
            pairs = zip(rows[first], rows[first + span], strict=True)
            angles = [math.acos(float(x @ y / (x.norm() * y.norm()))) / math.pi for x, y in pairs]
            assert value == pytest.approx(sum(angles) / len(angles), abs=1e-5)


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_block_that_is_made_redundant_is_found(block: int) -> None:
    transformer = without(deeper(), block)
    table = measure_layers(transformer, Pictures(), sigmas=SIGMAS)  # type: ignore[arg-type]
    for tokens in ("image", "text"):
        for is_centred in (False, True):
            values = table.distance(tokens, is_centred=is_centred)
            assert values[block] == 0
            assert np.nanargmin(values) == block
            assert np.sum(values == 0) == 1
    told = {0: "double 0", 1: "double 1", 3: "single 1"}[block]
    assert f"Of 5 blocks, {told} turns the picture's tokens least (0.000 of a half turn)" in headline(table)
    assert min(shares("distance", table, ()).values()) == 0
    given = {name for name, value in shares("distance", table, ()).items() if value == 0}
    assert {block_of(table, name) for name in given} == {block, None}


def gradients_by_autograd(transformer: FluxTransformer2DModel, seed: int = 0) -> dict[str, np.ndarray]:
    """Dense gradients of every picture and noise level, then the root of the mean of their squared norms."""
    layers = linears(transformer)
    squares = {name: np.zeros(len(SIGMAS)) for name in layers}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in Pictures().batches(1):
        for index, sigma in enumerate(SIGMAS):
            noise = paired_noise(batch.latents.shape[1:], seed, batch.sample_ids[0], sigma)[None]
            level = torch.tensor([sigma])
            v = model_velocity(transformer, batch.text)(interpolate(batch.latents, noise, level), level)
            (v - velocity_target(batch.latents, noise)).square().mean().backward()
            for name, layer in layers.items():
                squares[name][index] += float(layer.weight.grad.double().norm()) ** 2  # type: ignore[union-attr, operator]
                layer.weight.grad = None
    return {name: np.sqrt(value / 3) for name, value in squares.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_autograd(checkpointed: bool) -> None:
    transformer = tiny_transformer().requires_grad_(False)
    if checkpointed:
        transformer.enable_gradient_checkpointing()
    table = measure_layers(transformer, Pictures(), sigmas=SIGMAS)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert not any(layer._forward_hooks for layer in linears(transformer).values())
    wanted = gradients_by_autograd(tiny_transformer())
    assert list(table.gradients) == list(wanted) == list(linears(transformer))
    for name, values in wanted.items():
        assert table.gradients[name] == pytest.approx(values, rel=1e-4), name
        assert (values > 0).all()
    if not checkpointed:
        assert table.distance("image") == pytest.approx(
            measure_layers(transformer, Pictures(), sigmas=SIGMAS).distance("image")  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_checkpointing_no_input_of_a_layer_is_kept(checkpointed: bool) -> None:
    """Until backward: else checkpointing would spare little memory."""
    transformer = tiny_transformer().requires_grad_(False)
    if checkpointed:
        transformer.enable_gradient_checkpointing()
    [batch] = Pictures(1).batches(1)
    kept: list[StorageWeakRef] = []
    wide = transformer.single_transformer_blocks[0].proj_out
    handle = wide.register_forward_pre_hook(lambda module, args: kept.append(StorageWeakRef(args[0].untyped_storage())))
    with torch.enable_grad(), squared_gradients(linears(transformer)) as found:
        v = model_velocity(transformer, batch.text)(batch.latents, torch.tensor([0.5]))
        assert len(kept) == 1
        assert kept[0].expired() == checkpointed
        v.square().mean().backward()
    handle.remove()
    assert set(found) == set(linears(transformer))


def test_what_cannot_be_computed_finitely_is_refused() -> None:
    transformer = tiny_transformer().requires_grad_(False)
    transformer.proj_out.weight[0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"the gradient of .* is not finite at noise level 0\.3"):
        measure_layers(transformer, Pictures(), sigmas=SIGMAS)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_tokens_are_not_lost_in_few_bits(dtype: torch.dtype) -> None:
    """The gradient of a mean over 65,536 numbers is below what fp16 can tell from zero."""
    found = [
        measure_layers(tiny_transformer().requires_grad_(False).to(kind), Pictures(1, 64), sigmas=(0.5,)).gradients  # type: ignore[arg-type]
        for kind in (dtype, torch.float32)
    ]
    for name, values in found[1].items():
        assert found[0][name] == pytest.approx(values, rel=0.02), name


def test_gradients_of_int8_layers_are_those_of_the_dense_ones() -> None:
    transformer, dense = (tiny_transformer().requires_grad_(False) for _ in range(2))
    quantise_model(transformer)
    quantise_model(dense)
    dequantise_model(dense, torch.float32)
    table = measure_layers(transformer, Pictures(), sigmas=SIGMAS)  # type: ignore[arg-type]
    for name, values in gradients_by_autograd(dense).items():
        assert table.gradients[name] == pytest.approx(values, rel=1e-3), name


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_the_norm_of_a_gradient_of_few_and_of_many_tokens(tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(1, tokens, 24, generator=draw), torch.randn(1, tokens, 40, generator=draw)
    wanted = float((g[0].double().T @ x[0].double()).norm()) ** 2
    assert float(squared_norm(x, g)) == pytest.approx(wanted, rel=1e-5)
    assert squared_norm(x, g).dtype == torch.float64


def test_the_page_shows_what_was_found_and_names_are_only_text() -> None:
    table = measure_layers(without(deeper(), 3), Pictures(), sigmas=SIGMAS)  # type: ignore[arg-type]
    shown = page(table, (), (), ("<b>mine</b>", ""), "distance")
    assert "&lt;b&gt;mine&lt;/b&gt;" in shown
    assert "<b>mine</b>" not in shown
    assert headline(table).replace("'", "&#x27;") in shown
    assert shown.count('<svg viewBox="0 0 460 300"') == 5
    assert "single 1" in shown
    assert "<script" not in shown
    rows = table.as_json()["distances"]
    assert len(rows) == len(SIGMAS) * 2 * 2 * len([span for span in SPANS if span <= 5])
    assert [row["values"][-1] for row in rows if row["tokens"] == "text"] == [None] * (len(rows) // 2)
