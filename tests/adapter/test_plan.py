"""What an adapter section chooses: presets at full size, LyCORIS configs beside LyCORIS itself, files, starts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

from libreflux.adapter import plan
from libreflux.adapter.adapter import attach
from libreflux.adapter.formats import lycoris_name
from libreflux.adapter.init import check_start
from libreflux.adapter.io import save_adapter
from libreflux.adapter.layers import LoRA, delta_norm, delta_weight, dense_weight, linear_shapes
from libreflux.adapter.targets import Target, resolve, summary
from libreflux.errors import AdapterError
from libreflux.recipe import AdapterSpec
from tiny import tiny_transformer


def spec(**keys: Any) -> AdapterSpec:
    return AdapterSpec.model_validate(keys)


@pytest.fixture(scope="module")
def flux() -> FluxTransformer2DModel:
    """FLUX.1-schnell at full size, without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=False)


@pytest.mark.parametrize(("preset", "millions"), [("libreflux-600m", 597.7), ("libreflux-3.2b", 3226.8)])
def test_presets_have_their_size_on_the_real_flux(flux: nn.Module, preset: str, millions: float) -> None:
    rows = plan.plan(spec(preset=preset), flux).layers
    assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(millions, abs=0.05)
    on_block_0 = {row.factor for row in rows if row.name.startswith("transformer_blocks.0.")}
    assert on_block_0 == ({1} if preset == "libreflux-3.2b" else {3})


# ---- lycoris_config.json ------------------------------------------------------------------------------------------

FULL = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
ALL = ["FluxAttention", "FeedForward"]
CONFIGS: dict[str, dict[str, Any]] = {
    "no preset": {},
    "classes": {
        "target_module": ALL,
        "module_algo_map": {"FluxAttention": {"factor": 2}, "FeedForward": {"factor": 8}},
    },
    "nested classes": {
        "target_module": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
        "module_algo_map": {"FluxAttention": {"factor": 2}, "FluxTransformerBlock": {"factor": 16}},
    },
    "names before classes": {
        "target_module": ["FeedForward"],
        "name_algo_map": {
            r"transformer_blocks\.0\.attn\.to_q": {"factor": 2},
            r"transformer_blocks\.0\.attn": {"factor": 8},
            r"single_transformer_blocks\.[1-9]\.": {"factor": 2, "full_matrix": True},
        },
    },
    "shell": {
        "use_fnmatch": True,
        "target_module": ["FluxTransformerBlock"],
        "name_algo_map": {"single_*.[0-1].proj*": {"factor": 2}, "*.to_k": {}},
        "target_name": ["proj_out"],
        "exclude_name": ["*norm*"],
    },
}


@pytest.fixture
def lycoris_left_as_it_was() -> Iterator[None]:
    kept = {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()}
    yield
    for key, value in kept.items():
        setattr(LycorisNetwork, key, value)


@pytest.mark.usefixtures("lycoris_left_as_it_was")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("algo", ["lokr", "lora"])
def test_a_lycoris_config_means_what_it_means_to_lycoris(name: str, algo: str, tmp_path: Path) -> None:
    """The same layers with the same shapes as lycoris-lora makes on the same model."""
    root = FULL if algo == "lokr" else {**FULL, "algo": "lora", "linear_dim": 4, "linear_alpha": 2}
    path = tmp_path / "lycoris_config.json"
    path.write_text(json.dumps({**root, **({"apply_preset": CONFIGS[name]} if CONFIGS[name] else {})}))
    model = tiny_transformer()
    config = json.loads(path.read_text())
    planned = plan.plan(spec(kind=algo, lycoris_config=str(path)), model)
    LycorisNetwork.apply_preset(config.pop("apply_preset", {}))
    network = create_lycoris(model, **config)
    theirs = {}
    for one in network.loras:
        first, second = (one.lokr_w1, one.lokr_w2) if algo == "lokr" else (one.lora_up.weight, one.lora_down.weight)
        theirs[one.lora_name] = (tuple(first.shape), tuple(second.shape))
    assert {lycoris_name(row.name): (row.w1, row.w2) for row in planned.layers} == theirs
    assert len(theirs) >= 6
    assert sum(len(match.layers) for match in planned.matches) == len(theirs)


def test_ranges_in_published_configs_take_single_digits_and_the_table_says_so(flux: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    names = {"transformer_blocks.[8-15]*.ff*": {"factor": 5}, "single_transformer_blocks.[24-37]*": {"factor": 8}}
    path.write_text(
        json.dumps(
            {**FULL, "apply_preset": {"target_module": ["FluxAttention"], "name_algo_map": names, "use_fnmatch": True}}
        )
    )
    planned = plan.plan(spec(lycoris_config=str(path)), flux)
    by_key = {match.key: match.layers for match in planned.matches}
    blocks = {key: {int(name.split(".")[1]) for name in layers} for key, layers in by_key.items()}
    assert blocks["transformer_blocks.[8-15]*.ff*"] == {5}
    assert blocks["single_transformer_blocks.[24-37]*"] == {2, 7, *range(20, 30)}
    text = planned.text()
    assert "transformer_blocks.{5}.ff.net.0.proj" in text
    assert "{2,7,20-29}" in text
    path.write_text(path.read_text().replace('"use_fnmatch": true', '"use_fnmatch": false'))
    with pytest.raises(AdapterError, match=r"is no regular expression \(bad character range 8-1"):
        plan.plan(spec(lycoris_config=str(path)), flux)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"apply_preset": {"target_module": ["Attention", "FeedForward"]}}, "'Attention'.*FluxAttention"),
        ({"apply_preset": {"use_fnmatch": True, "exclude_name": ["norm_out"]}}, "match no linear .* 'norm_out'"),
        ({"apply_preset": {"use_fnmatch": True, "name_algo_map": {"*.norm1": {"factor": 2}}}}, r"'\*\.norm1'"),
        ({"apply_preset": {"name_algo_map": {"x": {"linear_dim": 4}}}}, "LyCORIS ignores linear_dim.*write dim"),
        ({"apply_preset": {"unet_target_module": ["x"]}}, "unet_target_module is not supported"),
        ({"linear_dim": 8, "factor": 2}, "low-rank LoKr .* full_matrix: true"),
        ({"algo": "loha"}, "algo 'loha' is not supported"),
        ({"algo": "lora", "linear_dim": 4}, "the recipe says lokr; hint: adapter.kind: lora"),
        ({"dora_wd": True}, "dora_wd is not supported"),
        ({"multiplier": 0.5}, "multiplier is not supported"),
        ({"init_lokr_norm": 1e-2}, "init_lokr_norm differs .* adapter.scale: 0.01"),
        ({"facter": 3}, "facter is not supported"),
    ],
)
def test_what_a_lycoris_config_cannot_have_here(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**FULL, **change}))
    with pytest.raises(AdapterError, match=told) as caught:
        plan.plan(spec(lycoris_config=str(path)), tiny_transformer())
    assert str(path) in str(caught.value)


# ---- starts -------------------------------------------------------------------------------------------------------


def rows_of(model: nn.Module, **target: Any) -> Any:
    return resolve(linear_shapes(model), [Target(layers="**", **target)])


def test_a_lora_starts_as_identity_with_kaiming_down() -> None:
    model = tiny_transformer()
    adapter = attach(model, rows_of(model, rank=4, alpha=2.0), seed=1)
    for layer in adapter.layers.values():
        assert isinstance(layer.delta, LoRA)
        assert layer.delta.scale == 0.5
        assert not layer.delta.lora_up.any()
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.5 * bound < layer.delta.lora_down.abs().max() <= bound
        assert layer.delta.lora_down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.35)
    assert len({id(parameter) for parameter in adapter.parameters()}) == 2 * len(adapter.layers)
    assert check_start(adapter.layers, "kaiming", 1e-3) == 0


@pytest.mark.parametrize("target", [{"factor": 4}, {"rank": 3}])
def test_delta_norm_is_the_norm_of_the_dense_delta(target: dict[str, int]) -> None:
    model = tiny_transformer()
    adapter = attach(model, rows_of(model, **target))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    for layer in adapter.layers.values():
        assert delta_norm(layer.delta) == pytest.approx(float(delta_weight(layer.delta).double().norm()), rel=1e-5)
    deltas = [float(delta_weight(layer.delta).norm()) for layer in adapter.layers.values()]
    weights = [float(dense_weight(layer.base, name).norm()) for name, layer in adapter.layers.items()]
    expected = math.hypot(*deltas) / math.hypot(*weights)
    assert check_start(adapter.layers, None, 1e-3) == pytest.approx(expected, rel=1e-5)


def test_a_perturbed_start_off_its_scale_is_refused() -> None:
    model = tiny_transformer()
    adapter = attach(model, rows_of(model, factor=4), dtype=torch.bfloat16, init="perturbed", scale=2e-3)
    assert check_start(adapter.layers, "perturbed", 2e-3) == pytest.approx(2e-3, rel=5e-3)
    name, layer = next(iter(adapter.layers.items()))
    with torch.no_grad():
        weight = layer.delta.lokr_w2
        assert isinstance(weight, torch.Tensor)
        weight.mul_(1.06)
    with pytest.raises(AdapterError, match=f"{name}: starts with .* not within 5 % of scale 0.002"):
        check_start(adapter.layers, "perturbed", 2e-3)


@pytest.mark.parametrize("target", [{"factor": 4}, {"rank": 3}])
def test_starting_from_a_file_takes_its_layers_and_values(target: dict[str, int], tmp_path: Path) -> None:
    kind = "lokr" if "factor" in target else "lora"
    model = tiny_transformer()
    adapter = attach(model, rows_of(model, **target)[3:9])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    save_adapter(adapter, tmp_path / "a.safetensors")
    wanted = spec(kind=kind, init_from=str(tmp_path / "a.safetensors"))
    other = tiny_transformer()
    planned = plan.plan(wanted, other)
    assert [row.name for row in planned.layers] == list(adapter.layers)
    again = plan.build(wanted, other, planned.layers, dtype=torch.float32, seed=0)
    assert sum(row.parameters for row in planned.layers) == sum(parameter.numel() for parameter in again.parameters())
    for key, tensor in adapter.state_dict().items():
        assert again.state_dict()[key].equal(tensor)
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in again.parameters()}
    assert plan.start_norm(wanted, again) > 0
    with pytest.raises(AdapterError, match="the recipe says"):
        plan.plan(spec(kind="lora" if kind == "lokr" else "lokr", init_from=wanted.init_from), tiny_transformer())


def test_summary_names_blocks_by_ranges() -> None:
    assert summary(["a.0.q", "a.1.q", "a.3.q", "a.0.k", "out"]) == "a.{0-1,3}.q, a.{0}.k, out"
