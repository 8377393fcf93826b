"""Adapters under the names of other programs: diffusers and PEFT are the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_transformer
from torch import Tensor

from libreflux.adapter.adapter import Adapter, attach
from libreflux.adapter.export import PROGRAMS, export_adapter, nearest_lora
from libreflux.adapter.io import attach_file, load_adapter, save_adapter
from libreflux.adapter.layers import LoKr, delta_weight, linear_shapes
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError
from libreflux.model.latents import image_ids
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def look(transformer: FluxTransformer2DModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    text = TextConditioning([torch.randn(5, 24, generator=generator)], torch.randn(1, 16, generator=generator))
    x = torch.randn(1, 4, 64, generator=generator)
    with torch.no_grad():
        return velocity(transformer, x, torch.tensor([0.6]), text, image_ids(4, 4))


def trained(kind: str, pattern: str = "**") -> tuple[FluxTransformer2DModel, Adapter]:
    """A tiny transformer with an adapter on its layers that does something everywhere."""
    flux = tiny_transformer()
    target = Target(layers=pattern, factor=2) if kind == "lokr" else Target(layers=pattern, rank=3, alpha=1.5)
    adapter = attach(flux, resolve(linear_shapes(flux), [target]))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return flux, adapter


@pytest.fixture(params=["lokr", "lora"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Tensor, str]:
    flux, adapter = trained(request.param)
    save_adapter(adapter, tmp_path / "own.safetensors", {"model": "tiny"})
    return tmp_path / "own.safetensors", look(flux), request.param


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_out_and_back_is_the_identity(saved: tuple[Path, Tensor, str], program: str, tmp_path: Path) -> None:
    path, expected, kind = saved
    out = tmp_path / f"{program}.safetensors"
    if kind == "lokr" and program in ("diffusers", "kohya"):
        with pytest.raises(AdapterError, match="add `rank` 64"):
            export_adapter(load_adapter(path), program, out)
        assert not out.exists()
        return
    assert export_adapter(load_adapter(path), program, out).lost == 0
    assert all(name.startswith(PROGRAMS[program].prefix) for name in load_file(out))
    before, after = load_adapter(path), load_adapter(out)
    folded = kind == "lora" and PROGRAMS[program].suffixes is not None  # alpha / rank = 0.5 is in lora_B
    expected_tensors = {
        name: tensor * 0.5 if folded and name.endswith("lora_up.weight") else tensor
        for name, tensor in before.tensors.items()
        if not (folded and name.endswith("alpha"))
    }
    assert expected_tensors.keys() == after.tensors.keys()
    for name, tensor in expected_tensors.items():
        torch.testing.assert_close(after.tensors[name], tensor, rtol=1e-6 if name.endswith("alpha") else 0, atol=0)
    assert after.metadata["model"] == "tiny"
    fresh = tiny_transformer()
    attach_file(fresh, out)
    torch.testing.assert_close(look(fresh), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("program", ["diffusers", "kohya"])
def test_a_lokr_as_its_nearest_lora(program: str, tmp_path: Path) -> None:
    flux, adapter = trained("lokr")
    save_adapter(adapter, tmp_path / "own.safetensors")
    expected, without = look(flux), look(tiny_transformer())
    losses, errors = [], []
    for rank in (1, 8, 64):
        out = tmp_path / f"{rank}.safetensors"
        losses.append(export_adapter(load_adapter(tmp_path / "own.safetensors"), program, out, rank=rank).lost)
        fresh = tiny_transformer()
        attach_file(fresh, out)
        errors.append(float((look(fresh) - expected).norm() / (without - expected).norm()))
    assert losses[0] > losses[1] > 0.02
    assert losses[2] < 1e-3
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_the_nearest_lora_is_that_of_the_dense_svd() -> None:
    torch.manual_seed(0)
    lokr = LoKr(12, 20, 4)
    for parameter in lokr.parameters():
        torch.nn.init.normal_(parameter)
    dense = delta_weight(lokr)
    u, s, v = torch.linalg.svd(dense)
    lora, error = nearest_lora(lokr, 5)
    torch.testing.assert_close(delta_weight(lora), u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float(s[5:].norm()), rel=1e-4)
    exact, none = nearest_lora(lokr, 99)
    torch.testing.assert_close(delta_weight(exact), dense, rtol=1e-4, atol=1e-4)
    assert none == pytest.approx(0, abs=1e-3)
    assert exact.lora_down.shape[0] <= 12


def test_diffusers_loads_our_lora_and_gives_the_same_velocity(tmp_path: Path) -> None:
    flux, adapter = trained("lora")
    expected = look(flux)
    save_adapter(adapter, tmp_path / "own.safetensors")
    for program in ("diffusers", "comfyui"):
        export_adapter(load_adapter(tmp_path / "own.safetensors"), program, tmp_path / f"{program}.safetensors")
        theirs = tiny_transformer()
        pipe = FluxPipeline(None, None, None, None, None, None, theirs)
        pipe.load_lora_weights(tmp_path, weight_name=f"{program}.safetensors")
        torch.testing.assert_close(look(theirs), expected, rtol=0, atol=1e-5)


def test_our_kohya_file_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    """At FLUX's own width, the only one that diffusers' converter knows."""
    torch.manual_seed(0)
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    sizes = {name: (i, o) for name, i, o in linear_shapes(flux) if "blocks." in name}
    tensors = {}
    for name, (columns, rows) in sizes.items():
        prefix = "lycoris_" + name.replace(".", "_")
        tensors[f"{prefix}.lora_down.weight"] = torch.randn(2, columns)
        tensors[f"{prefix}.lora_up.weight"] = torch.randn(rows, 2)
        tensors[f"{prefix}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "own.safetensors")
    export_adapter(load_adapter(tmp_path / "own.safetensors"), "kohya", tmp_path / "kohya.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(tmp_path / "kohya.safetensors"))
    for name in sizes:
        down, up = (theirs.pop(f"transformer.{name}.lora_{side}.weight") for side in "AB")
        prefix = "lycoris_" + name.replace(".", "_")
        expected = tensors[f"{prefix}.lora_up.weight"][:64] @ tensors[f"{prefix}.lora_down.weight"]
        torch.testing.assert_close(up[:64] @ down, expected, rtol=1e-4, atol=1e-4)
    assert not theirs


def test_pefts_own_file_with_its_alpha_in_the_metadata(tmp_path: Path) -> None:
    theirs = tiny_transformer()
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "proj_mlp"], alpha_pattern={"proj_mlp": 3}
    )
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path / "raw", weight_name="raw.safetensors")
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=load_file(tmp_path / "raw" / "raw.safetensors"),
        transformer_lora_adapter_metadata=config.to_dict(),
        weight_name="peft.safetensors",
    )
    ours = tiny_transformer()
    attach_file(ours, tmp_path / "peft.safetensors")
    torch.testing.assert_close(look(ours), look(theirs), rtol=0, atol=1e-5)


def test_a_fused_lokr_is_cut_exactly(tmp_path: Path) -> None:
    """As trainers write it that train on BFL's layers; factor 3 cuts between q, k and v, factor 4 does not."""
    torch.manual_seed(0)
    flux = tiny_transformer()
    for factor in (3, 4):
        w1, w2 = torch.randn(factor, 2), torch.randn(96 // factor, 16)
        save_file({f"{QKV}.lokr_w1": w1, f"{QKV}.lokr_w2": w2, f"{QKV}.alpha": torch.tensor(1.0)}, tmp_path / "f")
        tensors = load_adapter(tmp_path / "f").by_layer(dict(flux.named_modules()))
        whole = torch.cat(
            [
                torch.kron(*(tensors[f"transformer_blocks.0.attn.to_{one}"][f"lokr_w{n}"] for n in (1, 2)))
                for one in "qkv"
            ]
        )
        torch.testing.assert_close(whole, torch.kron(w1, w2))
        assert len(tensors["transformer_blocks.0.attn.to_q"]["lokr_w1"]) == 1


def test_text_encoders_tensors_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, adapter = trained("lora", "single_transformer_blocks.**")
    save_adapter(adapter, tmp_path / "own.safetensors")
    export_adapter(load_adapter(tmp_path / "own.safetensors"), "kohya", tmp_path / "kohya.safetensors")
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)}
    save_file(load_file(tmp_path / "kohya.safetensors") | text, tmp_path / "both.safetensors")
    read = load_adapter(tmp_path / "both.safetensors")
    assert read.tensors.keys() == load_adapter(tmp_path / "own.safetensors").tensors.keys()
    assert "transformer's tensors are used, not 1 tensor for text encoders" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"lora_unet_down_blocks_0_attn_to_q.lora_up.weight": (2, 2)}, {}, "fit no layer of FLUX"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": (2, 2)}, {}, "fit no layer of FLUX"),
        ({"transformer.x_embedder.lora_A.weight": (2, 64), "lora_unet_img_in.alpha": ()}, {}, "two spellings"),
        ({"transformer.x_embedder.lora_A.weight": (2, 64)}, {"lora_adapter_metadata": "{"}, "damaged lora_adapter"),
        (
            {f"{QKV}.lora_{side}.weight": shape for side, shape in (("down", (2, 32)), ("up", (90, 2)))},
            {},
            "90 rows are not",
        ),
        ({f"{QKV}.lokr_w1": (2, 2)}, {}, "needs lokr_w2"),
        ({"lora_te1_x.alpha": ()}, {}, "no tensors for a transformer"),
    ],
)
def test_what_cannot_be_read_is_named(
    tensors: dict[str, tuple[int, ...]], metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "strange.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path, metadata)
    with pytest.raises(AdapterError, match=words) as told:
        load_adapter(path)
    assert "strange.safetensors" in str(told.value)


def test_metadata_keep_a_key_map_that_fits(tmp_path: Path) -> None:
    _, adapter = trained("lora", "norm_out.linear")
    save_adapter(adapter, tmp_path / "own.safetensors")
    export_adapter(load_adapter(tmp_path / "own.safetensors"), "kohya", tmp_path / "k.safetensors")
    stored = load_file(tmp_path / "k.safetensors")
    up = load_file(tmp_path / "own.safetensors")["lycoris_norm_out_linear.lora_up.weight"]
    assert torch.equal(stored["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], torch.cat([up[32:], up[:32]]))
    assert json.loads(load_adapter(tmp_path / "k.safetensors").metadata["key_map"]) == {
        "lycoris_norm_out_linear": "norm_out.linear"
    }
