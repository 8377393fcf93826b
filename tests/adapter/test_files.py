"""Attaching, files (ours and lycoris-lora's, both ways) and merging, on a real small FLUX transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.io import AdapterFile, attach_file, load_adapter, save_adapter
from libreflux.adapter.layers import AdaptedLinear, LoKr, dense_weight, linear_shapes, linears
from libreflux.adapter.merge import merge, merge_many
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError
from tiny import tiny_transformer

TARGETS = [
    Target(layers="transformer_blocks.**", factor=4),
    Target(layers="single_transformer_blocks.{1}.**", factor=3),
    Target(layers="single_transformer_blocks.**", factor=2),
]


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer().eval()


def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    normal: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    with torch.no_grad():
        result: Tensor = model(
            hidden_states=normal(2, 6, 64),
            encoder_hidden_states=normal(2, 4, 24),
            pooled_projections=normal(2, 16),
            timestep=torch.tensor([0.3, 0.9], dtype=dtype),
            img_ids=torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], -1),
            txt_ids=torch.zeros(4, 3),
            return_dict=False,
        )[0]
    return result


def attached(model: nn.Module, seed: int = 0, **options: Any) -> Adapter:
    """An adapter with visible values."""
    adapter = attach(model, resolve(linear_shapes(model), TARGETS), init="ones", seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapter


def test_attach_freezes_starts_as_identity_and_detaches(model: FluxTransformer2DModel) -> None:
    before, names = output(model), [name for name, _ in model.named_modules()]
    adapter = attach(model, resolve(linear_shapes(model), TARGETS), init="kaiming", seed=0)
    assert output(model).equal(before)
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in adapter.parameters()}
    assert len(learning) == 2 * len(adapter.layers)
    assert model.dtype == torch.float32
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.1)
    assert not output(model).equal(before)
    adapter.detach()
    assert output(model).equal(before)
    assert [name for name, _ in model.named_modules()] == names


def test_gradient_checkpointing_in_the_real_model(model: FluxTransformer2DModel) -> None:
    adapter = attached(model, dtype=torch.bfloat16)
    results = []
    for checkpointing in (False, True):
        model.train()
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        ids = torch.zeros(5, 3)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            y = model(
                hidden_states=torch.randn(1, 5, 64),
                encoder_hidden_states=torch.randn(1, 5, 24),
                pooled_projections=torch.randn(1, 16),
                timestep=torch.tensor([0.5]),
                img_ids=ids,
                txt_ids=ids,
                return_dict=False,
            )[0]
        results.append(torch.autograd.grad(y.float().square().mean(), list(adapter.parameters()), allow_unused=True))
    used = 0
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.equal(two)
            assert one.dtype == torch.bfloat16
            used += bool(one.abs().sum() > 0)
    assert used >= 0.8 * len(results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_round_trip(model: FluxTransformer2DModel, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter, path = attached(model, dtype=dtype), tmp_path / "adapter.safetensors"
    expected = output(model)
    save_adapter(adapter, path, {"steps": "7"})
    adapter.detach()
    again = attach_file(model, path)
    assert output(model).equal(expected)
    assert load_adapter(path).metadata["steps"] == "7"
    assert list(again.layers) == list(adapter.layers)
    for key, tensor in again.state_dict().items():
        assert tensor.equal(adapter.state_dict()[key])
        assert tensor.dtype == adapter.state_dict()[key].dtype
    assert "lycoris_transformer_blocks_0_attn_to_out_0.lokr_w1" in again.state_dict()


def test_state_resumes_to_the_bit_and_refuses_others(model: FluxTransformer2DModel) -> None:
    adapter = attached(model)
    saved = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    adapter.load_state_dict(saved)
    for key, tensor in adapter.state_dict().items():
        assert tensor.equal(saved[key])
    key = next(iter(saved))
    with pytest.raises(AdapterError, match=f"missing {key}"):
        adapter.load_state_dict({other: tensor for other, tensor in saved.items() if other != key})
    with pytest.raises(AdapterError, match="leftover lycoris_x"):
        adapter.load_state_dict({**saved, "lycoris_x.alpha": torch.tensor(1.0)})
    with pytest.raises(AdapterError, match="bfloat16"):
        adapter.load_state_dict({**saved, key: saved[key].bfloat16()})


def test_weight_scales_and_adapters_stack(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    paths, before = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"], output(model)
    for seed, path in enumerate(paths):
        adapter = attached(model, seed)
        save_adapter(adapter, path)
        adapter.detach()
    none = attach_file(model, paths[0], weight=0.0)
    assert output(model).equal(before)
    none.detach()
    one = attach_file(model, paths[0], weight=0.5)
    alone = output(model)
    two = attach_file(model, paths[1], weight=-0.25)
    both = output(model)
    one.detach()  # the lower of the two
    two.detach()
    assert output(model).equal(before)
    merge_many(model, [(load_adapter(paths[0]), 0.5), (load_adapter(paths[1]), -0.25)])
    torch.testing.assert_close(output(model), both, rtol=0, atol=1e-5)
    assert (both - alone).abs().max() > 1e-3


# lycoris-lora both ways. Its presets are class-global: set them, and put the default back.


@pytest.fixture
def lycoris_preset() -> Iterator[None]:
    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": ["FluxTransformerBlock", "FluxSingleTransformerBlock"]}
    )
    yield
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"]})


@pytest.mark.usefixtures("lycoris_preset")
@pytest.mark.parametrize(
    "options",
    [
        {"linear_dim": 10_000, "linear_alpha": 1, "factor": 4, "full_matrix": True},
        {"linear_dim": 2, "linear_alpha": 1, "factor": 4},
        {"linear_dim": 2, "linear_alpha": 4, "factor": 2, "decompose_both": True},
    ],
    ids=["full", "low-rank", "both-low-rank"],
)
def test_their_files_give_equal_outputs_here(
    model: FluxTransformer2DModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    ours = copy.deepcopy(model)
    network = create_lycoris(model, 1.0, algo="lokr", bypass_mode=True, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "theirs.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    before, expected = output(ours), output(model)
    assert (expected - before).abs().max() > 1e-3
    adapter = attach_file(ours, path)
    assert len(adapter.layers) == len(network.loras)
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("lycoris_preset")
def test_our_files_give_equal_outputs_there(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    theirs, path = copy.deepcopy(model), tmp_path / "ours.safetensors"
    save_adapter(attached(model), path)
    network, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    before = output(theirs)
    network.apply_to()
    torch.testing.assert_close(output(theirs), output(model), rtol=0, atol=1e-5)
    assert (output(theirs) - before).abs().max() > 1e-3


def test_lora_files(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    path, name = tmp_path / "lora.safetensors", "single_transformer_blocks.0.proj_mlp"
    linear = linears(model)[name]
    assert isinstance(linear, nn.Linear)
    down, up = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
    key = "lycoris_" + name.replace(".", "_")
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}, path)
    weight = linear.weight.detach().clone()
    adapter = attach_file(model, path)
    expected = output(model)
    adapter.detach()
    assert merge(model, load_adapter(path)) == [name]
    torch.testing.assert_close(linear.weight.detach(), weight + 0.5 * up @ down)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-4)


def test_merge_is_fp32_and_rounds_once(model: FluxTransformer2DModel) -> None:
    adapter = attached(model)
    adapter.detach()
    model.to(torch.bfloat16)
    before = {name: dense_weight(linear, name).clone() for name, linear in linears(model).items()}
    biases = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.endswith("weight")}
    tensors = adapter.state_dict()
    changed = merge_many(model, [(tensors, 0.3), (adapter, 0.004)])
    assert changed == list(adapter.layers)
    for name, linear in linears(model).items():
        expected = before[name].float()
        if name in adapter.layers:
            delta = adapter.layers[name].delta
            assert isinstance(delta, LoKr)
            product = torch.kron(delta.lokr_w1, delta.lokr_w2).detach()
            expected = expected + 0.3 * product + 0.004 * product
        assert dense_weight(linear, name).equal(expected.bfloat16()), name
    for key, tensor in biases.items():
        assert model.state_dict()[key].equal(tensor)


def test_merge_equals_attached(model: FluxTransformer2DModel) -> None:
    adapter = attached(model)
    expected = output(model)
    with pytest.raises(AdapterError, match="detach"):
        merge(model, adapter)
    adapter.detach()
    merge(model, adapter)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-5)


class Int8Linear(nn.Module):
    """Shaped like a quantised linear: no floating-point weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("weight", torch.zeros(base.weight.shape, dtype=torch.int8))


def test_merge_refuses_before_it_changes_anything(model: FluxTransformer2DModel) -> None:
    adapter = attached(model)
    adapter.detach()
    model.proj_out = Int8Linear(model.proj_out)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = adapter.state_dict()
    on_int8 = {f"lycoris_proj_out.{key}": tensor for key, tensor in LoKr(32, 64, 2).tensors().items()}
    last = list(tensors)[-3]
    for wrong, match in (
        ({**tensors, **on_int8}, "quantised"),
        ({**tensors, last: torch.ones(5, 5)}, "does not fit"),
        ({**tensors, "lycoris_nowhere.alpha": torch.tensor(1.0)}, "lycoris_nowhere"),
        ({}, "no adapter"),
    ):
        with pytest.raises(AdapterError, match=match):
            merge(model, wrong)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(before[key])


def test_attach_takes_a_quantised_base_as_it_is(model: FluxTransformer2DModel) -> None:
    model.proj_out = Int8Linear(model.proj_out)
    adapter = attach(model, resolve(linear_shapes(model), [Target(layers="proj_out", factor=2)]), init="ones", seed=0)
    assert isinstance(model.proj_out, AdaptedLinear)
    assert list(adapter.layers) == ["proj_out"]


def test_broken_files(model: FluxTransformer2DModel, tmp_path: Path) -> None:
    before, path = output(model), tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterError, match="no such"):
        load_adapter(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(AdapterError, match="safetensors file"):
        load_adapter(path)
    save_file({"transformer.x.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(AdapterError, match="fit no layer of FLUX"):
        load_adapter(path)
    save_adapter(attached(tiny_transformer()), path)
    tensors = load_file(path)
    save_file({**tensors, "lycoris_nowhere.lokr_w1": torch.ones(1, 1)}, path)
    with pytest.raises(AdapterError, match=r"lycoris_nowhere\.lokr_w1"):
        attach_file(model, path)
    del tensors["lycoris_single_transformer_blocks_0_proj_mlp.lokr_w2"]
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="lokr_w2"):
        attach_file(model, path)
    save_file(tensors, path, metadata={"schema": "2"})
    with pytest.raises(AdapterError, match="schema 2"):
        load_adapter(path)
    assert output(model).equal(before)


def test_names_that_spell_alike_need_the_key_map() -> None:
    tensors = {"lycoris_a_b.alpha": torch.tensor(1.0)}
    with pytest.raises(AdapterError, match=r"a\.b or a_b"):
        AdapterFile("f", tensors, {}).by_layer(["a.b", "a_b"])
    found = AdapterFile("f", tensors, {"key_map": '{"lycoris_a_b": "a_b"}'}).by_layer(["a.b", "a_b"])
    assert list(found) == ["a_b"]


def test_resolved_for_another_model(model: FluxTransformer2DModel) -> None:
    rows = resolve([("proj_out", 8, 8)], [Target(layers="**", factor=2)])
    with pytest.raises(AdapterError, match="another model"):
        attach(model, rows)
    assert isinstance(model.proj_out, nn.Linear)
