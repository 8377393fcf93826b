"""`libreflux diff`: what was planted between two models is told, and comes back as an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import libreflux
from libreflux.adapter.difference import Change, ModelDifference, together
from libreflux.adapter.factors import lokr_shapes
from libreflux.adapter.layers import linears
from libreflux.errors import AdapterError, LibrefluxError, ModelError, OptionError, RunError
from libreflux.model.finite import NotFiniteError
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.single_file import SingleFiles
from libreflux.model.weight_reader import weight_reader
from libreflux.workflows.diff import DiffResult
from opened import opened, tensor_of
from tiny import change_json, tiny_transformer

Changed = Callable[..., Path]


@pytest.fixture
def changed(tiny_model_dir: Path, tmp_path: Path) -> Changed:
    """The tiny model with other weights, in a folder of its own."""

    def make(change: Callable[[FluxTransformer2DModel], None], name: str = "changed") -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("transformer"))
        transformer = FluxTransformer2DModel.from_pretrained(tiny_model_dir / "transformer")
        with torch.no_grad():
            change(transformer)
        transformer.save_pretrained(folder / "transformer")
        return folder

    return make


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plant(make: Callable[[int, int, int], Tensor]) -> Callable[[FluxTransformer2DModel], None]:
    """Adds make(out, in, number) to every linear's weight."""

    def change(transformer: FluxTransformer2DModel) -> None:
        for number, linear in enumerate(linears(transformer).values()):
            weight = linear.get_parameter("weight")
            weight.add_(make(weight.shape[0], weight.shape[1], number))

    return change


def low_rank(out_features: int, in_features: int, number: int) -> Tensor:
    return random(out_features, 2, seed=number) @ random(2, in_features, seed=number + 99)


def by_layer(found: DiffResult) -> dict[str, Change]:
    return {one.layer: one for one in found.changes if one.kind == "weight"}


def merged(model: Path, adapters: list[str], out: Path) -> dict[str, Tensor]:
    libreflux.merge(str(model), adapters, out=out)
    return dict(open_model(str(out)).load_transformer().state_dict())


def test_a_changed_layer_is_told_and_no_other(tiny_model_dir: Path, changed: Changed) -> None:
    def change(transformer: FluxTransformer2DModel) -> None:
        transformer.proj_out.weight *= 1.25
        transformer.proj_out.bias += 1
        transformer.transformer_blocks[0].attn.norm_q.weight *= 3

    found = libreflux.diff(str(tiny_model_dir), str(changed(change)))
    told = {one.name: one.relative for one in found.changes if one.change}
    assert told["proj_out.weight"] == pytest.approx(0.25, rel=1e-6)
    assert told["transformer_blocks.0.attn.norm_q.weight"] == pytest.approx(2.0, rel=1e-6)
    assert set(told) == {"proj_out.weight", "proj_out.bias", "transformer_blocks.0.attn.norm_q.weight"}
    assert [one.kind for one in found.not_held] == ["norm", "bias"]
    state = tiny_transformer().state_dict()
    assert {one.name: one.norm for one in found.changes} == pytest.approx(
        {name: float(tensor.double().norm()) for name, tensor in state.items()}
    )
    assert found.files == ()


def test_a_planted_low_rank_difference_comes_back_as_a_lora(
    tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    after, out = changed(plant(low_rank)), tmp_path / "d.safetensors"
    found = libreflux.diff(str(tiny_model_dir), str(after), rank=2, out=out)
    assert max(found.errors.values()) < 1e-5
    assert found.error < 1e-5
    wanted = open_model(str(after)).load_transformer().state_dict()
    reached = merged(tiny_model_dir, [str(out)], tmp_path / "merged")
    assert max(float((reached[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted) < 1e-5
    assert libreflux.diff(str(tiny_model_dir), str(after), rank=1, out=tmp_path / "e.safetensors").error > 0.1


def test_what_is_merged_is_off_by_the_told_error(tiny_model_dir: Path, changed: Changed, tmp_path: Path) -> None:
    after = changed(plant(lambda rows, columns, number: random(rows, columns, seed=number)))
    for name, how in (("lora", {"rank": 4}), ("lokr", {"factor": 4})):
        out = tmp_path / f"{name}.safetensors"
        found = libreflux.diff(str(tiny_model_dir), str(after), out=out, **how)  # type: ignore[arg-type]
        wanted = open_model(str(after)).load_transformer().state_dict()
        reached = merged(tiny_model_dir, [str(out)], tmp_path / name)
        layers = by_layer(found)
        assert set(found.errors) == set(layers) == set(linears(tiny_transformer()))
        for layer, error in found.errors.items():
            lacking = float((reached[f"{layer}.weight"] - wanted[f"{layer}.weight"]).norm())
            assert lacking / layers[layer].change == pytest.approx(error, rel=1e-4)
        assert 0.1 < found.error < 1


def test_a_planted_kronecker_difference_comes_back_as_a_lokr(
    tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    def kronecker(out_features: int, in_features: int, number: int) -> Tensor:
        first, second = lokr_shapes(in_features, out_features, 4)
        return torch.kron(random(*first, seed=number), random(*second, seed=number + 99))

    after, out = changed(plant(kronecker)), tmp_path / "d.safetensors"
    found = libreflux.diff(str(tiny_model_dir), str(after), factor=4, out=out)
    assert max(found.errors.values()) < 1e-5
    file = libreflux.load_adapter(out)
    assert found.parameters == sum(t.numel() for name, t in file.tensors.items() if not name.endswith(".alpha"))
    two = changed(plant(lambda *a: kronecker(*a) + kronecker(a[0], a[1], a[2] + 7)), "two")
    assert libreflux.diff(str(tiny_model_dir), str(two), factor=4, out=tmp_path / "1.safetensors").error > 0.1
    found = libreflux.diff(str(tiny_model_dir), str(two), factor=4, terms=2, out=tmp_path / "terms")
    assert found.error < 1e-5
    wanted = open_model(str(two)).load_transformer().state_dict()
    reached = merged(tiny_model_dir, [str(path) for path in found.files], tmp_path / "merged")
    assert max(float((reached[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted) < 1e-5


def test_a_written_difference_draws_as_the_second_model_and_is_used_like_it(
    tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    after, out = changed(plant(lambda *a: 0.1 * low_rank(*a))), tmp_path / "d.safetensors"
    facts = json.loads((after / "libreflux.json").read_text())
    (after / "libreflux.json").write_text(json.dumps(facts | {"steps": 3, "guidance": 1.0}))
    libreflux.diff(str(tiny_model_dir), str(after), rank=2, out=out)
    pipe, wanted = (libreflux.LibreFluxPipeline.from_pretrained(str(each)) for each in (tiny_model_dir, after))
    pipe.load_lora_weights(libreflux.load_adapter(out))
    drawn, there = (
        tensor_of(each("a red apple on blue", seeds=[1], height=32, width=32, output_type="latent"))
        for each in (pipe, wanted)
    )
    assert pipe.facts.steps == 3
    assert torch.allclose(drawn, there, atol=1e-3)


def test_an_adapter_of_the_first_model_draws_with_a_written_difference_as_on_the_second(
    tiny_model_dir: Path, changed: Changed, trained: Path, tmp_path: Path
) -> None:
    """A speed adapter: trained on a base, drawn in the few steps of what was made of it. The last one named decides."""
    second = changed(plant(low_rank))
    change_json(second / "libreflux.json", steps=2, guidance=1.0)
    speed = tmp_path / "speed.safetensors"
    libreflux.diff(str(tiny_model_dir), str(second), rank=2, out=speed)
    size: dict[str, Any] = {"seed": 3, "width": 32, "height": 32}
    own, first = str(trained), str(tiny_model_dir)
    both = libreflux.generate("a fox", model=first, adapters=[own, str(speed)], **size).pictures[0]
    there = libreflux.generate("a fox", model=str(second), adapters=own, steps=2, guidance=1.0, **size).pictures[0]
    assert (both.record.steps, both.record.guidance) == (2, 1.0)
    pixels = [np.array(one.image).astype(int) for one in (both, there)]
    assert abs(pixels[0] - pixels[1]).max() <= 2


def test_an_adapter_is_told_like_the_model_that_it_makes(
    tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    after, out = changed(plant(low_rank)), tmp_path / "d.safetensors"
    direct = libreflux.diff(str(tiny_model_dir), str(after), rank=2, out=out)
    adapted = libreflux.diff(str(tiny_model_dir), str(out))
    for one, other in zip(direct.changes, adapted.changes, strict=True):
        assert (one.name, one.kind, one.norm) == (other.name, other.kind, other.norm)
        assert other.change == pytest.approx(one.change, rel=1e-5)
    half = libreflux.diff(str(tiny_model_dir), f"{out}:0.5", rank=2, out=tmp_path / "half.safetensors")
    assert half.changes[-2].change == pytest.approx(adapted.changes[-2].change / 2, rel=1e-6)
    assert half.error < 1e-5


def test_every_way_of_storing_is_read_alike(tiny_model_dir: Path, tmp_path: Path) -> None:
    """bf16, int8 and single files, against the tensors that the model itself computes with."""
    opened(tiny_model_dir, dtype=torch.bfloat16).save(tmp_path / "bf16")
    quantise_folder(tiny_model_dir, tmp_path / "int8")
    [file] = [name for name in opened(tiny_model_dir).save_files(tmp_path / "files") if name.startswith("flux1")]
    for name in ("bf16", "int8", "file"):
        where = SingleFiles(transformer=tmp_path / "files" / file) if name == "file" else str(tmp_path / name)
        reader = weight_reader(open_model(where))
        state = open_model(where).load_transformer(quantise=False, dtype=torch.float32).state_dict()
        assert list(reader.shapes) == list(state)
        for key, tensor in state.items():
            assert torch.equal(reader.read(key), tensor), (name, key)
        found = ModelDifference(weight_reader(open_model(str(tiny_model_dir))), reader).changes()
        assert 0 <= together(found) < 0.01
        assert (together(found) == 0) == (name == "file")


def test_weights_that_are_stored_otherwise_are_not_taken_for_numbers(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantise_folder(tiny_model_dir, tmp_path / "int8")
    (tmp_path / "int8" / "checksums.json").unlink()
    [file] = (tmp_path / "int8" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    scale = next(name for name in tensors if name.endswith(".scale"))
    save_file({name: tensor for name, tensor in tensors.items() if name != scale}, file)
    [index] = file.parent.glob("*.index.json")
    table = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={name: where for name, where in table.items() if name != scale})
    with pytest.raises(ModelError, match=r"torch\.int8 without a scale"):
        libreflux.diff(str(tiny_model_dir), str(tmp_path / "int8"))
    change_json(tmp_path / "int8" / "transformer" / "config.json", quantization_config={"quant_method": "gguf"})
    with pytest.raises(ModelError, match="quantised by gguf"):
        weight_reader(open_model(str(tmp_path / "int8")))


def test_what_does_not_go_together_is_refused_in_one_line(
    tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    def refused(kind: type[LibrefluxError], told: str, *args: str, **options: object) -> None:
        with pytest.raises(kind, match=told) as error:
            libreflux.diff(*(args or (str(tiny_model_dir), str(tiny_model_dir))), **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    out = str(tmp_path / "a.safetensors")
    refused(OptionError, "nothing to write", out=out, rank=1)
    refused(OptionError, "one of them is needed", out=out)
    refused(OptionError, "one of them is needed", out=out, rank=1, factor=2)
    refused(OptionError, "has no effect without", rank=1)
    refused(OptionError, "has no effect on a LoRA", rank=1, terms=2, out=out)
    refused(OptionError, "is no .safetensors file", rank=1, out=str(tmp_path / "a"))
    refused(OptionError, "cannot be 0", factor=0, out=out)
    refused(OptionError, "at factor 1 one product is the whole", factor=1, terms=2, out=str(tmp_path / "a"))
    refused(OptionError, "terms are a folder", factor=2, terms=2, out=out)
    (tmp_path / "there.safetensors").write_text("mine")
    refused(RunError, "already exists", rank=1, out=str(tmp_path / "there.safetensors"))
    libreflux.diff(str(tiny_model_dir), str(changed(plant(low_rank))), rank=1, out=out)
    refused(OptionError, "is an adapter", out, str(tiny_model_dir))
    wider = changed(lambda transformer: None, "wider")
    FluxTransformer2DModel.from_config({**tiny_transformer().config, "num_single_layers": 3}).save_pretrained(
        wider / "transformer"
    )
    refused(ModelError, "has no single_transformer_blocks.2", str(wider), str(tiny_model_dir))
    refused(ModelError, "has no single_transformer_blocks.2", str(tiny_model_dir), str(wider))
    infinite = changed(lambda transformer: transformer.proj_out.bias.fill_(torch.inf), "infinite")
    refused(NotFiniteError, "proj_out.bias is not finite", str(tiny_model_dir), str(infinite))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"lycoris_no_layer.lokr_w1": torch.ones(1, 1), "lycoris_no_layer.lokr_w2": torch.ones(1, 1)}, foreign)
    refused(AdapterError, "fit no linear layer", str(tiny_model_dir), str(foreign))
    assert not list(tmp_path.glob(".*"))


def test_the_command_prints_the_error_of_each_layer_and_what_no_adapter_holds(
    run: Callable, tiny_model_dir: Path, changed: Changed, tmp_path: Path
) -> None:
    def change(transformer: FluxTransformer2DModel) -> None:
        plant(low_rank)(transformer)
        transformer.proj_out.bias += 1
        transformer.transformer_blocks[0].attn.norm_q.weight *= 3

    after, out = changed(change), tmp_path / "d.safetensors"
    done = run("diff", tiny_model_dir, after, "--rank", 1, "--out", out)
    assert done.code == 0, done.err
    assert len([line for line in done.out.splitlines() if ".weight" in line and line.count("%") == 2]) == len(
        linears(tiny_transformer())
    )
    assert "not written: 1 bias and 1 norm, which no adapter can hold" in done.out
    assert f"of the change, saved in {out}" in done.out
    grouped = run("diff", tiny_model_dir, after).out
    assert "single_transformer_blocks.{0-1}.attn.to_q.weight" in grouped
    told = json.loads(run("diff", tiny_model_dir, after, "--json").out)
    assert told["schema"] == 1
    assert [row["name"] for row in told["tensors"]] == list(tiny_transformer().state_dict())
