"""What an exported adapter holds, beyond its names: its scale, its kind, its metadata, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_transformer

from libreflux.adapter.adapter import attach
from libreflux.adapter.export import PROGRAMS, export_adapter
from libreflux.adapter.io import attach_file, load_adapter, save_adapter
from libreflux.adapter.layers import LoKr, delta_from_tensors, delta_weight, linear_shapes, linears
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError

LAYER = "transformer_blocks.0.attn.to_q"
PEFT = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.target_modules": ["to_q"]}


def saved(path: Path, *targets: Target, dtype: torch.dtype = torch.float32) -> Path:
    flux = tiny_transformer()
    adapter = attach(flux, resolve(linear_shapes(flux), list(targets)), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    save_adapter(adapter, path)
    return path


def delta(path: Path, layer: str = LAYER) -> torch.Tensor:
    linear = linears(tiny_transformer())[layer]
    assert isinstance(linear, torch.nn.Linear)
    tensors = load_adapter(path).by_layer([name for name, *_ in linear_shapes(tiny_transformer())])[layer]
    return delta_weight(delta_from_tensors(tensors, linear.in_features, linear.out_features, str(path)))


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_a_scale_in_the_metadata_is_written_once(program: str, tmp_path: Path) -> None:
    """PEFT's alpha 16 at rank 4 stays a scale of 4, and what the old file said of its tensors does not stay."""
    torch.manual_seed(0)
    down, up = 0.1 * torch.randn(4, 32), 0.1 * torch.randn(32, 4)
    stale = {"ss_network_dim": "4", "ss_network_alpha": "16", "sshs_model_hash": "ab", "modelspec.hash_sha256": "cd"}
    save_file(
        {f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up},
        tmp_path / "theirs.safetensors",
        {"lora_adapter_metadata": json.dumps(PEFT), "ss_output_name": "fox", **stale},
    )
    out = tmp_path / "out.safetensors"
    export_adapter(load_adapter(tmp_path / "theirs.safetensors"), program, out)
    metadata = load_adapter(out).metadata
    assert not {"lora_adapter_metadata", *stale} & set(metadata)
    assert metadata["ss_output_name"] == "fox"
    torch.testing.assert_close(delta(out), 4 * up @ down)
    if program in ("comfyui", "diffusers"):
        theirs = tiny_transformer()
        pipe = FluxPipeline(None, None, None, None, None, None, theirs)
        pipe.load_lora_weights(tmp_path, weight_name="out.safetensors")
        pipe.fuse_lora()
        change = theirs.transformer_blocks[0].attn.to_q.base_layer.weight - linears(tiny_transformer())[LAYER].weight
        torch.testing.assert_close(change, 4 * up @ down, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("program", ["comfyui", "diffusers"])
@pytest.mark.parametrize(("rank", "alpha", "kept"), [(4, 2.0, True), (4, 4.0, True), (3, 1.0, False)])
def test_alpha_is_folded_and_rounds_nothing(program: str, rank: int, alpha: float, kept: bool, tmp_path: Path) -> None:
    """alpha / rank is taken into lora_B: in bf16 where that is exact, else in fp32."""
    own = saved(tmp_path / "own.safetensors", Target(layers=LAYER, rank=rank, alpha=alpha), dtype=torch.bfloat16)
    export_adapter(load_adapter(own), program, tmp_path / "out.safetensors")
    stored = load_file(tmp_path / "out.safetensors")
    assert stored.keys() == {f"transformer.{LAYER}.lora_{side}.weight" for side in "AB"}
    assert stored[f"transformer.{LAYER}.lora_B.weight"].dtype == (torch.bfloat16 if kept else torch.float32)
    torch.testing.assert_close(delta(tmp_path / "out.safetensors"), delta(own), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_with_a_rank_every_lokr_becomes_a_lora(program: str, tmp_path: Path) -> None:
    targets = [
        Target(layers="**.attn.**", factor=2),
        Target(layers="norm_out.linear", rank=2),
        Target(layers="**", factor=4),
    ]
    own = saved(tmp_path / "own.safetensors", *targets)
    done = export_adapter(load_adapter(own), program, tmp_path / "out.safetensors", rank=64)
    stored = load_file(tmp_path / "out.safetensors")
    assert not [name for name in stored if "lokr" in name]
    assert done.lost < 1e-3
    flux = tiny_transformer()
    assert len(attach_file(flux, tmp_path / "out.safetensors").layers) == len(linear_shapes(tiny_transformer()))
    torch.testing.assert_close(delta(tmp_path / "out.safetensors"), delta(own), rtol=1e-3, atol=1e-4)
    again = load_adapter(tmp_path / "out.safetensors")
    with pytest.raises(AdapterError, match="has no LoKr that a rank could make a LoRA of; hint: leave out `rank`"):
        export_adapter(again, program, tmp_path / "again.safetensors", rank=64)


@pytest.mark.parametrize("program", sorted(PROGRAMS))
@pytest.mark.parametrize("pattern", ["**.attn.to_q", "**.proj_out", "norm_out.linear"])
def test_a_lokr_without_a_rank_stays_one_or_is_refused(program: str, pattern: str, tmp_path: Path) -> None:
    """Also one whose layers kohya does not fuse: sd-scripts would leave it out without a word."""
    file = load_adapter(saved(tmp_path / "own.safetensors", Target(layers=pattern, factor=2)))
    if PROGRAMS[program].lokr:
        export_adapter(file, program, tmp_path / "out.safetensors")
        assert [name for name in load_file(tmp_path / "out.safetensors") if name.endswith("lokr_w1")]
        return
    with pytest.raises(AdapterError, match=rf"{program} reads no LoKr; hint: add `rank` 64"):
        export_adapter(file, program, tmp_path / "out.safetensors")


def test_what_a_program_does_not_read_is_told(tmp_path: Path) -> None:
    file = load_adapter(saved(tmp_path / "own.safetensors", Target(layers="**", rank=2)))
    kohya = export_adapter(file, "kohya", tmp_path / "kohya.safetensors")
    assert kohya.unread == ("final_layer.adaLN_modulation.1", "final_layer.linear")
    assert kohya.ranks == (2, 6, 8)  # alone; q, k and v; and the MLP with them
    diffusers = export_adapter(file, "diffusers", tmp_path / "diffusers.safetensors")
    assert (diffusers.unread, diffusers.ranks) == ((), (2,))


@pytest.mark.parametrize("alpha", [None, 0.0])
@pytest.mark.parametrize(
    ("shapes", "rank", "program"),
    [
        ({"lora_down.weight": (4, 32), "lora_up.weight": (32, 4)}, 4, "kohya"),
        ({"lora_down.weight": (4, 32), "lora_up.weight": (32, 4)}, 4, "lycoris"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 8)}, 3, "lycoris"),
        ({"lokr_w1": (4, 4), "lokr_w2": (8, 8)}, 1, "lycoris"),
    ],
)
def test_no_alpha_becomes_the_rank(
    shapes: dict[str, tuple[int, int]], rank: int, program: str, alpha: float | None, tmp_path: Path
) -> None:
    """Files of PEFT and its kin have none, which sd-scripts and LyCORIS do not read."""
    layer = "transformer_blocks.0.attn.to_out.0"
    prefix = f"lycoris_{layer.replace('.', '_')}"
    torch.manual_seed(0)
    tensors = {f"{prefix}.{suffix}": torch.randn(shape) for suffix, shape in shapes.items()}
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "theirs.safetensors")
    export_adapter(load_adapter(tmp_path / "theirs.safetensors"), program, tmp_path / "out.safetensors")
    assert [float(t) for name, t in load_file(tmp_path / "out.safetensors").items() if name.endswith("alpha")] == [rank]
    torch.testing.assert_close(
        delta(tmp_path / "out.safetensors", layer), delta(tmp_path / "theirs.safetensors", layer)
    )


def test_a_full_lokr_has_alpha_1_which_is_its_dim_in_lycoris(tmp_path: Path) -> None:
    """A full matrix has no rank: LyCORIS takes 1 for it when it reads a file, so alpha / dim is 1 there."""
    own = saved(tmp_path / "own.safetensors", Target(layers=LAYER, factor=2))
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, str(own), tiny_transformer())
    [layer] = network.loras
    assert float(load_file(own)[f"lycoris_{LAYER.replace('.', '_')}.alpha"]) == layer.lora_dim == 1 == layer.scale


@pytest.mark.parametrize("target", [Target(layers=LAYER, rank=3, alpha=1.5), Target(layers=LAYER, factor=2)])
def test_a_state_is_put_back_whole(target: Target, tmp_path: Path) -> None:
    """Alpha too, and one that fp32 cannot hold keeps its own digits where the state has the same."""
    flux, other = tiny_transformer(), tiny_transformer()
    adapter = attach(flux, resolve(linear_shapes(flux), [target]))
    again = attach(other, resolve(linear_shapes(other), [Target(layers=LAYER, factor=target.factor, rank=target.rank)]))
    again.load_state_dict(adapter.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in adapter.state_dict().items())
    before, after = adapter.layers[LAYER].delta, again.layers[LAYER].delta
    torch.testing.assert_close(delta_weight(after), delta_weight(before), rtol=0, atol=0)
    if not isinstance(after, LoKr):
        assert (after.alpha, after.scale) == (1.5, 0.5)
        after.rescale(0.1)
        again.load_state_dict(again.state_dict())
        assert after.alpha == 0.1
