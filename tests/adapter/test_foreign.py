"""Adapters as other programs write them: PEFT's folders, fp8, other spellings, what is left out and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_transformer
from torch import Tensor

from libreflux.adapter import peft
from libreflux.adapter.export import export_adapter
from libreflux.adapter.io import attach_file, load_adapter
from libreflux.adapter.layers import delta_weight
from libreflux.adapter.merge import merge
from libreflux.adapter.peft import Config
from libreflux.errors import AdapterError, LibrefluxError
from libreflux.model.finite import NotFiniteError
from libreflux.workflows.adapters import adapter_file
from libreflux.workflows.export import is_adapter

LAYER = "transformer_blocks.0.attn.to_q"
FLAT = LAYER.replace(".", "_")
DOWN = 0.2 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
UP = 0.2 * torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
FP8 = torch.float8_e4m3fn


def lora(prefix: str = "transformer.", a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict[str, Tensor]:
    return {f"{prefix}{LAYER}.{a}": DOWN.clone(), f"{prefix}{LAYER}.{b}": UP.clone()}


def delta(path: Path, layer: str = LAYER) -> Tensor:
    """What an adapter file adds to a layer of the tiny transformer."""
    flux = tiny_transformer()
    return delta_weight(attach_file(flux, path).layers[layer].delta).detach()


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def peft_folder(folder: Path, **config: Any) -> Path:
    written(folder / "adapter_model.safetensors", lora("base_model.model."))
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["to_q"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4.0),
        ({"lora_alpha": 2}, 0.5),
        ({"use_rslora": True}, 8.0),
        ({"alpha_pattern": {"to_q": 8}}, 2.0),
        ({"alpha_pattern": {"attn.to_q": 8, "to_k": 1}}, 2.0),
        ({"alpha_pattern": {"q": 8}}, 4.0),
        ({"r": 64, "rank_pattern": {"to_q": 4}}, 4.0),
        (
            {"r": 64, "rank_pattern": {"to_q|to_k": 4}, "alpha_pattern": {r".*\.0\.attn\.to_q": 6}, "use_rslora": True},
            3.0,
        ),
    ],
)
def test_pefts_folder_has_its_scale(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    folder = peft_folder(tmp_path / "peft", **config)
    for place in (folder, folder / "adapter_model.safetensors"):
        torch.testing.assert_close(delta(place), scale * UP @ DOWN)
    assert adapter_file(folder) == folder / "adapter_model.safetensors"
    assert is_adapter(str(folder))
    stored = load_adapter(folder)
    export_adapter(stored, "lycoris", tmp_path / "out.safetensors")
    torch.testing.assert_close(delta(tmp_path / "out.safetensors"), scale * UP @ DOWN)


def test_pefts_own_folder_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        use_rslora=True,
        target_modules=["to_q", "proj_mlp", "linear"],
        alpha_pattern={"proj_mlp": 3, r"norm1\.linear": 5},
        rank_pattern={"norm1.linear": 2},
    )
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_transformer(), config)
    theirs.save_pretrained(str(tmp_path / "peft"))
    merged = theirs.merge_and_unload().state_dict()
    ours = tiny_transformer()
    changed = merge(ours, load_adapter(tmp_path / "peft"))
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.proj_mlp"} <= set(changed)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": None}, "damaged adapter_config.json .*no lora_alpha"),
        ({"r": 8}, "rank 8 is told of .*to_q, its tensors have 4"),
        ({"peft_type": "LOKR"}, "adapter_config.json: LOKR is not read"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"alpha_pattern": {"(": 1}}, "damaged"),
        ({"lora_alpha": "much"}, "damaged"),
    ],
)
def test_a_scale_that_cannot_be_known(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        load_adapter(peft_folder(tmp_path / "peft", **config))


@pytest.mark.parametrize("of", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(.|.)*[XYZ]", "(.|[a-z.]|_)+[XYZ]"])
def test_a_pattern_that_takes_for_ever_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, pattern: str
) -> None:
    monkeypatch.setattr(Config, "left", 0.02)
    folder = peft_folder(tmp_path / "peft", **{of: {pattern: 4}})
    with pytest.raises(AdapterError, match=f"its {of} takes too long to match; hint: name the layers"):
        load_adapter(folder)


@pytest.mark.parametrize("pattern", ["([a-z_.0-9]+)+[XYZ]", "(.+)+!"])
def test_a_pattern_that_would_take_for_ever_in_pythons_own_engine_fits_no_layer(tmp_path: Path, pattern: str) -> None:
    plain = load_adapter(peft_folder(tmp_path / "plain"))
    found = load_adapter(peft_folder(tmp_path / "peft", alpha_pattern={pattern: 100}))
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in found.tensors.items())


def test_many_patterns_share_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them alone is quick."""
    monkeypatch.setattr(Config, "left", 0.1)
    many = {f"(.+)(.+)(.+){number}": 4 for number in range(100_000)}
    with pytest.raises(AdapterError, match="its alpha_pattern takes too long"):
        load_adapter(peft_folder(tmp_path / "peft", alpha_pattern=many))


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"damaged adapter_config\.json"):
        load_adapter(folder)


def test_pefts_file_alone_tells_no_scale(tmp_path: Path) -> None:
    alone = written(tmp_path / "renamed.safetensors", lora("base_model.model."))
    with pytest.raises(AdapterError, match=r"its scale is not known; hint: keep PEFT's adapter_config.json"):
        load_adapter(alone)
    alpha = {f"base_model.model.{LAYER}.alpha": torch.tensor(8.0)}
    told = written(tmp_path / "told.safetensors", lora("base_model.model.") | alpha)
    torch.testing.assert_close(delta(told), 2 * UP @ DOWN)


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    about = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})
    written(tmp_path / "out" / "pytorch_lora_weights.safetensors", lora(), {"lora_adapter_metadata": about})
    torch.testing.assert_close(delta(adapter_file(tmp_path / "out")), 4 * UP @ DOWN)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "16"}, 4.0),
        ({"lora_alpha": "16.0", "use_rslora": "True"}, 8.0),
        ({"lora_alpha": "16", "use_rslora": "False"}, 4.0),
        ({"transformer.lora_alpha": "2"}, 0.5),
        ({"format": "pt"}, 1.0),
    ],
)
def test_alpha_in_plain_metadata(tmp_path: Path, metadata: dict[str, str], scale: float) -> None:
    torch.testing.assert_close(delta(written(tmp_path / "a.safetensors", lora(), metadata)), scale * UP @ DOWN)


@pytest.mark.parametrize(
    ("prefix", "a", "b"),
    [
        ("transformer.base_model.model.", "lora_A.weight", "lora_B.weight"),
        ("transformer.", "lora_A.default_0.weight", "lora_B.default_0.weight"),
        ("diffusion_model.", "lora_A.default.weight", "lora_B.default.weight"),
        ("transformer.", "lora_A.my_style.weight", "lora_B.my_style.weight"),
        ("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
        ("", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_spellings(tmp_path: Path, prefix: str, a: str, b: str) -> None:
    torch.testing.assert_close(delta(written(tmp_path / "a.safetensors", lora(prefix, a, b))), UP @ DOWN)


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    other = lora(a="lora_A.second.weight", b="lora_B.second.weight")
    with pytest.raises(AdapterError, match=rf"two tensors are lora_\w+\.weight of transformer\.{LAYER}"):
        load_adapter(written(tmp_path / "a.safetensors", lora() | other))


ALONE = {f"lycoris_{FLAT}.lokr_w1": UP[:4].clone(), f"lycoris_{FLAT}.lokr_w2": DOWN[:, :8].repeat(2, 1)}


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_fp8_adapters_are_used_everywhere(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in (lora() if kind == "lora" else ALONE).items()}
    path = written(tmp_path / "eight.safetensors", tensors)
    one, other = (tensor.float() for tensor in tensors.values())
    expected = other @ one if kind == "lora" else torch.kron(one, other)
    assert torch.equal(delta(path), expected)
    flux = tiny_transformer()
    before = flux.get_submodule(LAYER).weight.detach().clone()
    merge(flux, load_adapter(path))
    torch.testing.assert_close(flux.get_submodule(LAYER).weight - before, expected)
    export_adapter(load_adapter(path), "comfyui", tmp_path / "out.safetensors")
    torch.testing.assert_close(delta(tmp_path / "out.safetensors"), expected, rtol=1e-2, atol=1e-2)


def test_one_adapter_of_two_dtypes(tmp_path: Path) -> None:
    tensors = lora()
    tensors[f"transformer.{LAYER}.lora_A.weight"] = DOWN.bfloat16()
    found = delta(written(tmp_path / "a.safetensors", tensors))
    torch.testing.assert_close(found, UP @ DOWN.bfloat16().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        (
            {"bundle_emb.mytoken.clip_l": torch.ones(1, 16), "bundle_emb.mytoken.t5": torch.ones(1, 32)},
            "2 tensors for text",
        ),
        ({"text_encoder.x.lora_A.weight": torch.ones(2, 2)}, "1 tensor for text"),
        ({f"diffusion_model.{LAYER}.diff_b": torch.zeros(32)}, ""),
        ({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.zeros(16)}, ""),
        ({"diffusion_model.img_in.diff": torch.zeros(32, 64, dtype=FP8)}, ""),
    ],
)
def test_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Tensor], warned: str
) -> None:
    path = written(tmp_path / "a.safetensors", lora() | more)
    torch.testing.assert_close(delta(path), UP @ DOWN)
    assert warned in caplog.text
    assert bool(warned) == bool(caplog.text)


NAN = torch.full((32,), torch.nan)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"diffusion_model.img_in.diff": torch.eye(32)}, AdapterError, "img_in.diff is a whole difference"),
        ({f"diffusion_model.{LAYER}.diff_b": NAN}, AdapterError, "diff_b is a whole difference"),
        ({f"transformer.{LAYER}.lora_B.weight": UP.to(torch.int8)}, AdapterError, "lora_B.weight is stored as int8"),
        ({f"transformer.{LAYER}.lora_B.weight": UP * torch.nan}, NotFiniteError, "lora_B.weight is not finite"),
        ({f"transformer.{LAYER}.lora_B.weight": UP / 0}, NotFiniteError, "lora_B.weight is not finite"),
        ({f"transformer.{LAYER}.alpha": torch.tensor(torch.nan)}, NotFiniteError, "alpha is not finite"),
        ({f"transformer.{LAYER}.lora_A.weight_scale": torch.tensor(2.0)}, AdapterError, "lora_A.weight_scale"),
    ],
)
def test_what_is_refused(tmp_path: Path, more: dict[str, Tensor], error: type[LibrefluxError], words: str) -> None:
    with pytest.raises(error, match=words) as told:
        load_adapter(written(tmp_path / "bad.safetensors", lora() | more))
    assert "bad.safetensors" in str(told.value)
    assert "; hint: " in str(told.value)


def test_a_single_nan_of_many(tmp_path: Path) -> None:
    tensors = lora()
    tensors[f"transformer.{LAYER}.lora_B.weight"][3, 1] = torch.nan
    with pytest.raises(NotFiniteError):
        load_adapter(written(tmp_path / "bad.safetensors", tensors))
    assert not load_file(tmp_path / "bad.safetensors")[f"transformer.{LAYER}.lora_A.weight"].isnan().any()


@pytest.mark.parametrize("pattern", ["((a{1000}){1000}){100}", "(" * 3000 + ")" * 3000, "|".join(["word"] * 1000)])
def test_a_pattern_that_is_costly_to_make_ready_is_refused(pattern: str) -> None:
    config = peft.Config({"r": 4, "lora_alpha": 4, "rank_pattern": {pattern: 4}})
    with pytest.raises(AdapterError, match=r"x\.safetensors"):
        peft.alpha_of(config, "transformer_blocks.0.attn.to_q", 4, "x.safetensors")


def test_plain_names_are_looked_up_without_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.regex, "match", None)  # calling it would fail
    names = {f"transformer_blocks.{index}.attn.to_q": index + 1 for index in range(494)}
    config = peft.Config({"r": 4, "lora_alpha": 4, "alpha_pattern": names})
    assert peft.alpha_of(config, "transformer_blocks.493.attn.to_q", 4, "x") == 494
    assert peft.alpha_of(config, "single.3.attn.to_q", 4, "x") == 4


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e308, 10**400, True])
@pytest.mark.parametrize("told", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_scale_is_refused(alpha: float, told: str) -> None:
    config = peft.Config({"r": 4, "lora_alpha": 4, told: alpha if told == "lora_alpha" else {".*": alpha}})
    with pytest.raises(AdapterError, match="damaged adapter_config"):
        peft.alpha_of(config, "transformer_blocks.0.attn.to_q", 4, "x.safetensors")


@pytest.mark.parametrize("name", ["use_rslora", "use_dora"])
@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_a_switch_that_is_neither_true_nor_false_is_refused(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"{name} cannot be"):
        load_adapter(peft_folder(tmp_path / "peft", **{name: value}))
