"""The int8 base in memory: its error, what its layers compute, and the gradients of adapters on it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import AdaptedLinear, LoKr, delta_weight, linear_shapes, linears
from libreflux.adapter.merge import merge
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError, ModelError
from libreflux.model import int8
from libreflux.model.int8 import (
    Int8Linear,
    dense_weight,
    dequantise,
    int8_layers,
    quantise,
    quantise_model,
    quantise_weight,
)
from model.random_inputs import random_weight, run
from tiny import tiny_transformer


def linear(in_features: int, out_features: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    made = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        made.weight.copy_(random_weight(out_features, in_features))
    return made.to(dtype)


def dense_twin(module: nn.Module) -> nn.Module:
    """A copy with nn.Linear of the dequantised weights in the place of every int8 linear, in its bias' dtype."""
    twin = copy.deepcopy(module)
    for name in int8_layers(twin):
        old = twin.get_submodule(name)
        assert isinstance(old, Int8Linear)
        assert old.bias is not None
        new = nn.Linear(old.in_features, old.out_features, dtype=old.bias.dtype).requires_grad_(False)
        new.weight.copy_(dense_weight(old))
        new.bias.copy_(old.bias)
        path, _, child = name.rpartition(".")
        setattr(twin.get_submodule(path), child, new)
    return twin


# ---- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_no_weight_is_off_by_more_than_half_a_scale(dtype: torch.dtype, magnitude: float) -> None:
    weight = magnitude * random_weight(64, 300)
    weight[0, 7] = 50 * magnitude  # an outlier costs its own row only
    weight[1] = 0
    weight[2] = -weight[2].abs()  # one-sided
    weight = weight.to(dtype)
    q, scale = quantise_weight(weight)
    error = (weight.double() - scale.double()[:, None] * q).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    used = q.abs().amax(dim=1)
    assert used[1] == 0
    assert scale[1] > 0
    assert dequantise(q, scale, dtype)[1].eq(0).all()
    assert ((used[torch.arange(64) != 1] >= 126) & (used[torch.arange(64) != 1] <= 127)).all()


def test_bf16_weights_are_rounded_once() -> None:
    """The scale is a bf16 number, q too: their bf16 product is the exact product rounded to nearest."""
    q, scale = quantise_weight(random_weight(32, 100))
    assert scale.bfloat16().float().equal(scale)
    assert dequantise(q, scale, torch.bfloat16).equal((scale.double()[:, None] * q).bfloat16())


def test_what_cannot_be_quantised_is_refused() -> None:
    for value in (torch.nan, torch.inf):
        for shape in ((3, 4), (96, 128)):
            weight = random_weight(*shape)
            weight[1, 2] = value
            with pytest.raises(ModelError, match=r"block\.to_q: has weights that are not finite"):
                quantise_weight(weight, "block.to_q")
    weight = random_weight(96, 128)
    weight.view(torch.int32)[1, 2] = -1  # a NaN of ones: rounding its bits up would give 0
    with pytest.raises(ModelError, match="not finite"):
        quantise_weight(weight)
    with pytest.raises(ModelError, match=r"torch\.int8 \(3, 4\), not a floating-point matrix"):
        quantise_weight(torch.zeros(3, 4, dtype=torch.int8))
    with pytest.raises(ModelError, match="Conv2d has no dense weight"):
        dense_weight(nn.Conv2d(1, 1, 1), "x")


# ---- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_a_linear_of_its_weights_computes(dtype: torch.dtype, bias: bool) -> None:
    plain = linear(48, 80, dtype, bias)
    ours = quantise(plain)
    plain.weight.data = dense_weight(ours).to(dtype)
    results = []
    for layer in (plain, ours):
        x = random_weight(10, 48, seed=1).reshape(2, 5, 48).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(random_weight(10, 80, seed=2).reshape(2, 5, 80).to(dtype))
        assert x.grad is not None
        results.append((y, x.grad))
    assert results[0][0].equal(results[1][0])
    assert results[0][1].equal(results[1][1])


def test_autograd_keeps_no_dense_weight() -> None:
    ours, x = quantise(linear(256, 512)), torch.randn(1, 256, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ours(x)
    assert sum(tensor.nbytes for tensor in kept) <= 256 * 512 + 4 * 512 + x.nbytes
    y.sum().backward()
    with torch.enable_grad():
        ours.requires_grad_(True)  # nothing to switch on
    assert list(ours.parameters()) == []
    assert not any(buffer.requires_grad for buffer in ours.buffers())


def test_autocast_and_casts() -> None:
    plain = linear(48, 80)
    ours = quantise(plain)
    x = random_weight(5, 48, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.no_grad():
        assert y.equal(copy.deepcopy(ours).bfloat16()(x.bfloat16()))
    scale = ours.scale.clone()
    for cast in (ours.half(), ours.to(torch.bfloat16), ours.double()):
        assert cast.scale.equal(scale)
        assert cast.scale.dtype == torch.float32
        assert cast.weight.dtype == torch.int8


# ---- the transformer ----------------------------------------------------------------------------------------------


def test_blocks_become_int8_with_their_adaln_and_the_ends_do_not() -> None:
    plain = tiny_transformer()
    shapes = linear_shapes(plain)
    plain = plain.bfloat16()
    names = quantise_model(plain)
    assert linear_shapes(plain) == shapes  # targets resolve as before
    blocks = [name for name, _, _ in shapes if "transformer_blocks." in name]
    assert names == blocks
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.norm.linear"} < {*names}
    rest = {name: module for name, module in linears(plain).items() if name not in names}
    assert {name.split(".")[0] for name in rest} == {
        "time_text_embed",
        "context_embedder",
        "x_embedder",
        "norm_out",
        "proj_out",
    }
    assert all(type(module) is nn.Linear for module in rest.values())
    assert quantise_model(plain) == names  # again changes nothing
    assert plain.dtype == torch.bfloat16
    assert (
        run(plain).dtype == torch.float32
    )  # velocity() finds bf16 and computes in it, or the kept linears would refuse


def test_which_linears_are_int8_by_path() -> None:
    """Written out, for one double and two single blocks: their AdaLN linears are int8 too, and none outside of them."""
    transformer = tiny_transformer()
    double = [
        "norm1.linear",
        "norm1_context.linear",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ]
    single = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
    in_int8 = {f"transformer_blocks.0.{name}" for name in double}
    in_int8 |= {f"single_transformer_blocks.{block}.{name}" for block in (0, 1) for name in single}
    spared = {
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
    }
    assert set(linears(transformer)) == in_int8 | spared
    assert set(quantise_model(transformer)) == in_int8
    plain = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert plain == spared


def adapted(transformer: nn.Module) -> dict[str, nn.Parameter]:
    adapter = attach(transformer, resolve(linear_shapes(transformer), [Target(layers="**", factor=4)]), seed=3)
    return dict(adapter.named_parameters())


def test_adapters_get_the_gradients_of_the_dense_base_and_the_base_gets_none() -> None:
    over_int8 = tiny_transformer()
    quantise_model(over_int8)
    over_dense = dense_twin(over_int8)
    gradients = []
    for transformer in (over_int8, over_dense):
        trained = adapted(transformer)
        run(transformer).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
        others = {id(parameter) for parameter in trained.values()}
        base = [t for t in (*transformer.parameters(), *transformer.buffers()) if id(t) not in others]
        assert base
        assert all(tensor.grad is None and not tensor.requires_grad for tensor in base)
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-6)


def test_a_perturbed_start_is_in_proportion_to_the_int8_weights() -> None:
    transformer = tiny_transformer()
    before = {name: dense_weight(layer).clone() for name, layer in linears(transformer).items()}
    quantise_model(transformer)
    adapted(transformer)
    for name, layer in linears(transformer).items():
        assert isinstance(layer, AdaptedLinear)
        assert isinstance(layer.delta, LoKr)
        ratio = delta_weight(layer.delta).norm() / before[name].norm()
        assert ratio.item() == pytest.approx(1e-3, rel=1e-2), name


def test_merging_into_int8_is_refused_and_changes_nothing() -> None:
    transformer = tiny_transformer()
    quantise_model(transformer)
    adapter = attach(transformer, resolve(linear_shapes(transformer), [Target(layers="**.attn.to_q", factor=4)]))
    adapter.detach()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with pytest.raises(AdapterError, match=r"to_q: Int8Linear is quantised; hint: use the model's bf16 weights"):
        merge(transformer, adapter)
    assert all(tensor.equal(before[name]) for name, tensor in transformer.state_dict().items())


def test_flux1_takes_12_gigabytes() -> None:
    """FLUX.1's own configuration, shapes alone: the block weights in a byte, the rest in bf16."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel()
    dense = sum(parameter.numel() for parameter in transformer.parameters())
    names = quantise_model(transformer.bfloat16())
    assert (dense, len(names), len(linears(transformer))) == (11_891_178_560, 19 * 14 + 38 * 6, 504 - 2)
    tensors = [*transformer.parameters(), *transformer.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(11.96e9, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(301, 77), (64, 128), (320, 64), (1536, 256), (192, 3072)])
def test_a_product_is_that_of_the_dense_weight(size: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    """For few rows too, which torch multiplies by int8 weights as stored, and of sizes that its kernel cannot take."""
    torch.manual_seed(0)
    weight, scale = quantise_weight(torch.randn(size))
    x = torch.randn(2, rows, size[1], dtype=dtype)[:1]
    for bias in (torch.randn(size[0], dtype=dtype), None):
        found = int8.product(x, weight, scale, bias)
        wanted = F.linear(x, dequantise(weight, scale, dtype), bias)
        assert found.dtype == dtype
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert float(error) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_few_rows_at_any_address() -> None:
    """Where torch's kernel for int8 weights as stored would end the process."""
    torch.manual_seed(0)
    weight, scale = quantise_weight(torch.randn(128, 128))
    moved = torch.empty(128 * 128 + 8, dtype=torch.int8)[8:].view(128, 128).copy_(weight)
    flat = torch.randn(4 * 128 + 1, dtype=torch.bfloat16)
    for x in (flat[1:].view(4, 128), torch.randn(4, 130).bfloat16()[:, :128], torch.randn(128, 4).bfloat16().T):
        for held in (weight, moved):
            found = int8.product(x, held, scale, None)
            torch.testing.assert_close(found, F.linear(x, dequantise(weight, scale, x.dtype)), rtol=0.05, atol=0.1)


def test_threads_do_not_share_the_memory_of_a_dense_weight() -> None:
    """And one thread's next product does not change what the last one gave."""
    torch.manual_seed(0)
    layers = [quantise_weight(torch.randn(256, 256)) for _ in range(8)]
    x = torch.randn(300, 256)
    wanted = [F.linear(x, dequantise(*layer, torch.float32)) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda layer: int8.product(x, layer[0], layer[1], None), layers * 20))
    assert all(one.equal(wanted[index % 8]) for index, one in enumerate(found))
