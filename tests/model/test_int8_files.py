"""Int8 folders: how they are made, opened, shared and refused, and that they are never in memory as a whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from libreflux.errors import ModelError, RunError
from libreflux.model import int8_files
from libreflux.model.facts import read_facts
from libreflux.model.int8 import Int8Linear, int8_layers, quantise_model
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.source import weights_hash
from model.random_inputs import random_weight, run
from opened import opened

# ---- on disk ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantised into a folder; read it, do not write into it."""
    return quantise_folder(tiny_model_dir, tmp_path_factory.mktemp("int8") / "model")


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.equal(theirs[name]), name


def test_every_way_to_int8_gives_the_same_tensors(tiny_model_dir: Path, int8_dir: Path, tmp_path: Path) -> None:
    in_memory = open_model(tiny_model_dir).load_transformer()
    quantise_model(in_memory)
    wanted = in_memory.state_dict()
    assert_same(open_model(tiny_model_dir).load_transformer(quantise=True).state_dict(), wanted)
    again = opened(int8_dir)
    assert_same(again.transformer.state_dict(), wanted)
    assert not again.transformer.training
    assert not any(parameter.requires_grad for parameter in again.transformer.parameters())
    assert run(again.transformer).equal(run(in_memory))
    assert_same(open_model(again.save(tmp_path / "saved")).load_transformer().state_dict(), wanted)
    both = [open_model(folder).load_transformer(dtype="bf16", quantise=True) for folder in (int8_dir, tiny_model_dir)]
    half, other = (one.state_dict() for one in both)
    assert_same(half, other)
    assert {t.dtype for name, t in half.items() if not name.endswith("scale")} == {torch.bfloat16, torch.int8}


def test_an_int8_folder_opens_in_floating_point_too_and_then_diffusers_reads_it(int8_dir: Path, tmp_path: Path) -> None:
    in_int8, dense = opened(int8_dir), opened(int8_dir, quantise=False)
    assert not int8_layers(dense.transformer)
    for name, module in in_int8.transformer.named_modules():
        if isinstance(module, Int8Linear):
            made = dense.transformer.get_submodule(name)
            assert isinstance(made, nn.Linear)
            assert made.weight.equal(module.weight.float() * module.scale[:, None]), name
    torch.testing.assert_close(run(dense.transformer), run(in_int8.transformer), atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in dense.transformer.parameters())
    pipe = FluxPipeline.from_pretrained(dense.save(tmp_path / "dense"))
    assert run(pipe.transformer).equal(run(dense.transformer))


def test_what_two_int8_models_have_alike_is_stored_once(int8_dir: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(int8_dir, first)
    changed = opened(int8_dir)
    layer = changed.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    layer.scale.mul_(2.0)
    changed.save(second)
    before = {name: part.clone() for name, part in changed.transformer.state_dict().items()}
    alone = weights_hash(second)

    shared = int8_files.share_equal(second / "transformer", first / "transformer")
    kept = {name for file in (second / "transformer").glob("*.safetensors") for name in load_file(file)}
    assert kept == {f"transformer_blocks.0.attn.to_q.{part}" for part in ("weight", "scale", "bias")}
    assert kept.isdisjoint(shared)
    assert kept | set(shared) == set(before)
    found = open_model(second).load_transformer()
    assert all(torch.equal(part, before[name]) for name, part in found.state_dict().items())

    # The hash covers the other folder's files too: with another first, second is another model.
    hashed = weights_hash(second)
    assert hashed != alone
    assert hashed == weights_hash(second)
    file = next((first / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert weights_hash(second) != hashed
    file.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_model(second).load_transformer()


def test_an_int8_folder_says_what_it_is(tiny_model_dir: Path, int8_dir: Path) -> None:
    facts, before = read_facts(int8_dir), read_facts(tiny_model_dir)
    assert facts.lineage["quantised"]["sha256"] == weights_hash(tiny_model_dir) != weights_hash(int8_dir)
    assert (facts.text_padding, facts.steps, facts.licence) == (before.text_padding, before.steps, before.licence)
    with pytest.raises(ValueError, match="libreflux_int8"):  # not bytes taken for weights
        FluxPipeline.from_pretrained(int8_dir)
    with pytest.raises(ModelError, match="is stored in int8"):
        quantise_folder(int8_dir, int8_dir.parent / "twice")
    with pytest.raises(RunError, match="already exists"):
        quantise_folder(tiny_model_dir, int8_dir)
    assert [path.name for path in int8_dir.parent.iterdir()] == [int8_dir.name]


def test_shards_in_and_shards_out(
    tiny_model_dir: Path, int8_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    whole = open_model(source).load_transformer()
    shutil.rmtree(source / "transformer")
    whole.save_pretrained(source / "transformer", max_shard_size="100KB")
    assert len(list((source / "transformer").glob("*.safetensors"))) > 2
    monkeypatch.setattr(int8_files, "SHARD_BYTES", 40_000)
    out = quantise_folder(source, tmp_path / "out")
    shards = sorted((out / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 40_000 for shard in shards)
    assert_same(*(open_model(folder).load_transformer().state_dict() for folder in (out, int8_dir)))
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"{shards[1].name}: cannot be loaded .*; hint: the file is missing"):
        open_model(out).load_transformer()


@pytest.fixture
def damage(tiny_model_dir: Path, int8_dir: Path, tmp_path: Path) -> list[Path]:
    """A dense and an int8 copy to be damaged."""
    both = {"dense": tiny_model_dir, "int8": int8_dir}
    made = [Path(shutil.copytree(folder, tmp_path / name)) for name, folder in both.items()]
    (made[1] / "checksums.json").unlink()  # it would say that the file is damaged, before what is wrong with it
    return made


def test_damage_is_named_and_leaves_no_folder(damage: list[Path], tmp_path: Path) -> None:
    for folder in damage:
        [file] = (folder / "transformer").glob("*.safetensors")
        whole, layer = file.read_bytes(), "transformer_blocks.0.attn.to_q"
        tensors = load_file(file)
        weight = tensors[f"{layer}.weight"]
        index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        table = json.loads(index.read_text()) if index.exists() else {"weight_map": {}}
        for change, message in (
            ({f"{layer}.bias": None}, rf"missing keys: {layer}\.bias"),
            ({"stray.weight": weight.clone()}, r"unexpected keys: stray\.weight"),
            ({f"{layer}.weight": weight[:8].clone()}, r"to_q\.weight is \(8, 32\)|\(8, 32\) torch"),
            (
                {f"{layer}.bias": torch.zeros(32, dtype=torch.int8)},
                rf"{layer}\.bias is \(32,\) torch|stores I8, which is not read \({layer}\.bias",
            ),
        ):
            changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
            save_file(changed, file)
            if index.exists():
                index.write_text(json.dumps({**table, "weight_map": dict.fromkeys(changed, file.name)}))
            with pytest.raises(ModelError, match=message):
                open_model(folder).load_transformer(quantise=True)
            if folder.name == "dense":
                with pytest.raises(ModelError, match=message):
                    quantise_folder(folder, tmp_path / "out")
        file.write_bytes(whole[:-100])
        with pytest.raises(ModelError, match="cannot be loaded"):
            open_model(folder).load_transformer(quantise=True)
    config = damage[1] / "transformer" / "config.json"
    later = {"quant_method": "libreflux_int8", "schema": 2}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": later}))
    with pytest.raises(ModelError, match="int8 schema 2 is not 1; hint: update libreflux"):
        open_model(damage[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "int8"]


# ---- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from libreflux.model import int8_files, quantise
from libreflux.model.int8_files import empty_int8, load_int8

def peak():  # of this program alone; getrusage's also counts the process that started it
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

int8_files.SHARD_BYTES = 50_000_000
source, out = Path(sys.argv[1]), Path(sys.argv[2])
empty_int8(source / "transformer")
start = peak()
quantise.quantise_folder(source, out)
written = peak()
held = load_int8(source / "transformer")
print(start, written, peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_folder_is_quantised_without_being_held(tiny_model_dir: Path, tmp_path: Path) -> None:
    """555 MB of bf16 in 8 shards: onto disk in int8 within 200 MB, into memory within the int8 size and 200 MB."""
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source, ignore=shutil.ignore_patterns("transformer"))
    (source / "transformer").mkdir()
    with torch.device("meta"):
        shapes = FluxTransformer2DModel(num_layers=4, num_single_layers=8, num_attention_heads=8)
    shapes.save_config(source / "transformer")
    pattern, tensors = random_weight(1, 2**23)[0].bfloat16(), dict[str, Tensor]()
    weight_map, shards = {}, 0
    for name, tensor in shapes.state_dict().items():
        tensors[name] = pattern[: tensor.numel()].reshape(tensor.shape).clone()
        weight_map[name] = f"{shards}.safetensors"
        if sum(t.nbytes for t in tensors.values()) > 70e6 or name == list(shapes.state_dict())[-1]:
            save_file(tensors, source / "transformer" / f"{shards}.safetensors")
            tensors, shards = {}, shards + 1
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    dense = sum(file.stat().st_size for file in (source / "transformer").glob("*.safetensors"))
    assert dense > 540e6
    assert shards >= 7
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    start, written, loaded = map(int, done.stdout.split())
    int8 = sum(file.stat().st_size for file in (tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert int8 < 0.53 * dense
    assert written - start < 200e6, (start, written, dense)
    assert loaded - start < int8 + 200e6, (start, loaded, int8)
