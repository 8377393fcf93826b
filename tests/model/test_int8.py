"""The int8 base: its error, its gradients, and folders that are never in memory as a whole."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from libreflux.adapter.adapter import attach
from libreflux.adapter.layers import AdaptedLinear, LoKr, delta_weight, linear_shapes, linears
from libreflux.adapter.merge import merge
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError, ModelError, RunError
from libreflux.model import int8, int8_files
from libreflux.model.facts import read_facts
from libreflux.model.int8 import (
    Int8Linear,
    dense_weight,
    dequantise,
    int8_layers,
    quantise,
    quantise_model,
    quantise_weight,
)
from libreflux.model.latents import image_ids
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.source import weights_hash
from libreflux.model.text import TextConditioning
from libreflux.model.velocity import velocity
from opened import opened
from tiny import tiny_transformer

IDS = image_ids(4, 6)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


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


def run(transformer: nn.Module) -> Tensor:
    """The velocity of two samples of unequal prompts."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(length, 24, generator=generator) for length in (3, 7)]
    text = TextConditioning(tokens, torch.randn(2, 16, generator=generator))
    packed = torch.randn(2, len(IDS), 64, generator=generator)
    assert isinstance(transformer, FluxTransformer2DModel)
    return velocity(transformer, packed, torch.tensor([0.2, 0.7]), text, IDS)


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


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_product_in_parts_is_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    """Sizes that are no multiples of anything, with and without bias, gradients included."""
    torch.manual_seed(0)
    weight, scale = quantise_weight(torch.randn(301, 77))
    x = torch.randn(2, rows, 77, dtype=dtype)
    calls: list[int] = []

    def counted(weight: Tensor, *more: Any) -> Tensor:
        calls.append(len(weight))
        return dequantise(weight, *more)

    for bias in (torch.randn(301, dtype=dtype), None):
        whole = int8.product(x, weight, scale, bias)
        with monkeypatch.context() as patch:
            patch.setattr(int8, "WHOLE", 0)
            patch.setattr(int8, "IN_CACHE", 77 * 50)
            patch.setattr(int8, "dequantise", counted)
            parts = int8.product(x, weight, scale, bias)
        torch.testing.assert_close(parts, whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert calls == ([32] * 9 + [13]) * 2
