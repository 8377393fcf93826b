"""Merging tensor by tensor: the same numbers as in memory, rounded once, and what rounding leaves is told truly."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from libreflux.adapter.adapter import attach
from libreflux.adapter.io import AdapterFile, load_adapter, save_adapter
from libreflux.adapter.layers import delta_from_tensors, delta_weight, linear_shapes
from libreflux.adapter.merge import MergedTensors, merge_many
from libreflux.adapter.rounding import WHOLE, Kept, Rounding, kept, rounding, together
from libreflux.adapter.targets import Target, resolve
from libreflux.errors import AdapterError
from libreflux.model import streamed
from libreflux.model.finite import NotFiniteError
from libreflux.model.int8 import dequantise, quantise_weight
from libreflux.model.int8_files import tensor_files
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.ranges import RangedFile
from libreflux.model.streamed import StreamedTransformer
from libreflux.model.weight_reader import WeightReader, weight_reader
from tiny import tiny_transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = "single_transformer_blocks.*.attn.**"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    """An adapter that changes some layers by a hundredth, and one outside the blocks."""
    model, path = tiny_transformer(), tmp_path_factory.mktemp("adapter") / "a.safetensors"
    targets = [Target(layers=LAYERS, factor=2), Target(layers="proj_out", factor=2)]
    adapter = attach(model, resolve(linear_shapes(model), targets), init="ones")
    draw = torch.Generator().manual_seed(3)
    for layer in adapter.layers.values():
        for parameter in layer.delta.parameters():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    save_adapter(adapter, path)
    return load_adapter(path)


@pytest.fixture(scope="module")
def int8(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise_folder(tiny_model_dir, tmp_path_factory.mktemp("models") / "int8")


def reader(folder: Path) -> WeightReader:
    return weight_reader(open_model(folder))


def delta(file: AdapterFile, layer: str, weight: Tensor) -> Tensor:
    tensors = file.by_layer([layer, *file.layer_names().values()])[layer]
    return delta_weight(delta_from_tensors(tensors, weight.shape[1], weight.shape[0], layer)).detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_by_one_is_as_in_memory_to_the_bit(
    tiny_model_dir: Path, file: AdapterFile, tmp_path: Path, dtype: str
) -> None:
    model = FluxTransformer2DModel.from_pretrained(tiny_model_dir / "transformer")
    changed = merge_many(model, [(file, 0.5), (file, 0.25)])
    before = reader(tiny_model_dir)
    merged = MergedTensors(before, [(file, 0.5), (file, 0.25)], dtype=DTYPES[dtype])
    StreamedTransformer(model.config, DTYPES[dtype], False, merged).write(tmp_path / "transformer")
    found = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    wanted = {name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}
    assert list(merged.changed) == changed
    assert [row.layer for row in merged.roundings] == changed
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_files_of_several_shards_are_read_by_diffusers(
    tiny_model_dir: Path, file: AdapterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "SHARD_BYTES", 100_000)
    model = FluxTransformer2DModel.from_pretrained(tiny_model_dir / "transformer")
    merged = MergedTensors(reader(tiny_model_dir), [(file, 1.0)], dtype=torch.float32)
    StreamedTransformer(model.config, torch.float32, False, merged).write(tmp_path / "transformer")
    merge_many(model, [(file, 1.0)])
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", use_safetensors=True)
    sizes = [path.stat().st_size for path in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(sizes) > 3
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_of_an_int8_model_only_what_changes_gets_other_bytes(int8: Path, file: AdapterFile, tmp_path: Path) -> None:
    before = reader(int8)
    merged = MergedTensors(before, [(file, 1.0)], dtype=before.dtype, int8=True)
    folder = tmp_path / "transformer"
    StreamedTransformer(open_model(int8).config, before.dtype, True, merged).write(folder)
    old, new = ({n: RangedFile(f).read(n) for n, f in tensor_files(d).items()} for d in (int8 / "transformer", folder))
    changed = {f"{layer}.{end}" for layer in merged.changed for end in ("weight", "scale")} & old.keys()
    assert old.keys() == new.keys()
    assert {name for name in old if not old[name].equal(new[name])} == changed - {"proj_out.scale"}
    layer = merged.changed[0]
    wide = dequantise(old[f"{layer}.weight"], old[f"{layer}.scale"], torch.float32)
    q, scale = quantise_weight(wide + delta(file, layer, wide))
    assert new[f"{layer}.weight"].equal(q)
    assert new[f"{layer}.scale"].equal(scale)


def test_what_is_told_of_each_layer_is_so(int8: Path, file: AdapterFile) -> None:
    before = reader(int8)
    merged = MergedTensors(before, [(file, 2.0)], dtype=torch.bfloat16)
    made = dict(merged(list(before.shapes)))
    for row in merged.roundings:
        weight = before.read(f"{row.layer}.weight")
        added, stored = 2 * delta(file, row.layer, weight), made[f"{row.layer}.weight"].float()
        assert row.norm == pytest.approx(float(weight.norm()))
        assert row.change == pytest.approx(float(added.norm()), rel=1e-4)
        assert row.stored.error == pytest.approx(float((stored - weight - added).norm() / added.norm()), rel=1e-3)
        assert row.stored.share == pytest.approx(float(((stored - weight) * added).sum() / added.norm() ** 2), rel=1e-3)
        coarse = stored if row.layer == "proj_out" else dequantise(*quantise_weight(stored), torch.float32)
        assert row.int8.error == pytest.approx(float((coarse - weight - added).norm() / added.norm()), rel=1e-3)


def test_a_change_of_less_than_half_a_step_is_lost_on_the_grid_of_int8() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (32, 64), generator=draw).float()
    weight[:, 0] = 127  # so that the scale is 1, and stays 1
    change = 0.3 * torch.randn(32, 64, generator=draw).sign()
    change[weight.abs() == 127] = 0
    total = weight + change
    stored = dequantise(*quantise_weight(total), torch.float32)
    assert kept(weight, total, stored).share == pytest.approx(0, abs=1e-3)
    assert kept(weight, total, stored).error == pytest.approx(1, abs=1e-3)
    assert kept(weight, total, total) == WHOLE


def test_a_change_survives_rounding_where_the_weights_lie_anywhere() -> None:
    """What is lost here is gained there: the share is 1 on average, though the error is larger than the change."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=draw)
    change = 1e-3 * torch.randn(512, 512, generator=draw)
    before = dequantise(*quantise_weight(weight), torch.float32)
    after = dequantise(*quantise_weight(weight + change), torch.float32)
    assert float(((after - before) * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.1)
    assert kept(weight, weight + change, after).error > 5


def test_layers_together_weigh_by_their_change() -> None:
    rows = [Rounding("a", 1, 3, Kept(1, 0), WHOLE), Rounding("b", 1, 4, Kept(0, 1), WHOLE)]
    found = together((row, row.stored) for row in rows)
    assert found == Kept(pytest.approx(9 / 25), pytest.approx(math.sqrt(16 / 25)))  # type: ignore[arg-type]
    assert together([]) == WHOLE
    still = rounding("a", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), int8=True)
    assert (still.change, still.stored, still.int8) == (0, WHOLE, WHOLE)


@pytest.mark.parametrize("as_int8", [False, True])
def test_no_tensor_is_held_beside_the_next(
    int8: Path, file: AdapterFile, monkeypatch: pytest.MonkeyPatch, as_int8: bool
) -> None:
    before, alive = reader(int8), 0
    held: list[weakref.ref[Tensor]] = []
    read: Callable[[str], Tensor] = before.read

    def watched(name: str) -> Tensor:
        nonlocal alive
        alive = max(alive, sum(one() is not None for one in held))
        tensor = read(name).clone()
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(before, "read", watched)
    merged = MergedTensors(before, [(file, 1.0)], dtype=torch.bfloat16, int8=as_int8)
    for _, tensor in merged(list(before.shapes)):
        held.append(weakref.ref(tensor))
        del tensor
    assert len(held) > len(merged.changed)
    assert alive == 0


def test_what_fits_nowhere_or_overflows_is_refused(int8: Path, file: AdapterFile) -> None:
    before = reader(int8)
    with pytest.raises(AdapterError, match="no adapter"):
        MergedTensors(before, [], dtype=torch.float32)
    with pytest.raises(AdapterError, match="overflows"):
        MergedTensors(before, [(file, 1e9)], dtype=torch.float32)
    foreign = {"lycoris_elsewhere.lokr_w1": torch.ones(1, 1)}
    with pytest.raises(AdapterError, match="fit no linear layer"):
        MergedTensors(before, [(foreign, 1.0)], dtype=torch.float32)
    large = {"lycoris_proj_out.lokr_w1": torch.full((1, 1), 7e4), "lycoris_proj_out.lokr_w2": torch.eye(64, 32)}
    with pytest.raises(NotFiniteError, match="not finite"):
        dict(MergedTensors(before, [(large, 1.0)], dtype=torch.float16)(["proj_out.weight"]))
