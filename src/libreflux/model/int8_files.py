"""An int8 transformer on disk, written and read tensor by tensor: no more than one dense tensor is in memory.

The folder is a diffusers transformer folder whose int8 linears have `<layer>.weight` (int8 [out, in]) and
`<layer>.scale` (fp32 [out]); the other tensors are as they were. Its config.json carries `quantization_config:
{quant_method: libreflux_int8}`, so that diffusers, which would take the bytes for weights, refuses it by that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from libreflux.errors import ModelError
from libreflux.files import atomic_save_safetensors, atomic_write_json
from libreflux.model.checksums import verified_part, write_checksums
from libreflux.model.int8 import Int8Linear, int8_layers, quantise_model, quantise_weight
from libreflux.model.locate import CHECKSUMS, INT8
from libreflux.model.parts import named, reading, shard_files, visible, weight_variant
from libreflux.model.ranges import RangedFile

METHOD = INT8
SHARD_BYTES = 500_000_000  # what a writer holds in memory

WEIGHTS = "diffusion_pytorch_model"
"""What diffusers calls the files of a transformer."""

_MARK = {"quant_method": METHOD, "schema": 1}
_DIFFER = "the weights and config.json differ"


def stored_as(config: Mapping[str, Any], where: object) -> str | None:
    """How a transformer's config says that its weights are quantised: None, "libreflux_int8", or another's method.

    Raises:
        ModelError: an int8 folder of a later version.
    """
    mark = config.get("quantization_config")
    if not mark:
        return None
    if not isinstance(mark, dict):
        raise ModelError(f"quantization_config cannot be {mark!r}", where=where, hint="remove it from config.json")
    if mark.get("quant_method") == METHOD and mark.get("schema") != _MARK["schema"]:
        raise ModelError(f"int8 schema {mark.get('schema')!r} is not 1", where=where, hint="update libreflux")
    return str(mark.get("quant_method"))


def empty_int8(folder: Path) -> FluxTransformer2DModel:
    """The transformer that a folder's config.json describes, its block linears int8, on the meta device."""
    config = {**FluxTransformer2DModel.load_config(folder)}
    config.pop("quantization_config", None)  # of the files, not of the model: that may be dense later
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    quantise_model(transformer)
    return transformer


def stream_int8(
    folder: Path, empty: FluxTransformer2DModel, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the int8 transformer of a folder, dense or int8, in the order of its files.

    Dense weights are quantised from the numbers on disk, before any cast.

    Args:
        folder: a model's `transformer` folder.
        empty: `empty_int8(folder)`: the names and shapes that there must be.
        device: where tensors are moved and quantised.

    Raises:
        ModelError: a tensor is missing, left over, not finite, or of another shape or kind than config.json says; or a
            file is not as the model's checksums say, which may be found at the end.
    """
    with verified_part(folder, _neighbours(folder)):
        yield from _stream(folder, empty, device)


def _stream(folder: Path, empty: FluxTransformer2DModel, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    layers, wanted = set(int8_layers(empty)), empty.state_dict()
    stored = stored_as(empty.load_config(folder), folder)
    if stored not in (None, METHOD):
        raise ModelError(f"is quantised by {stored}", where=folder, hint="start from its bf16 weights")
    files = tensor_files(folder)
    on_disk = wanted.keys() if stored else wanted.keys() - {f"{layer}.scale" for layer in layers}
    _refuse("missing keys", on_disk - files.keys(), folder)
    _refuse("unexpected keys", files.keys() - on_disk, folder)
    read = _reader()
    for name, file in files.items():
        layer, _, attribute = name.rpartition(".")
        parts = {name: read(file, name).to(device)}
        if layer in layers and attribute == "weight" and not stored:
            parts[name], parts[f"{layer}.scale"] = quantise_weight(parts[name], name)
        elif parts[name].device.type == "cpu":
            parts[name] = parts[name].clone()  # out of the mapped file
        for part, tensor in parts.items():
            _check(part, tensor, wanted[part], folder)
            yield part, tensor


def load_int8(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    waiting: tuple[str, ...] = (),
) -> FluxTransformer2DModel:
    """An int8 transformer from a folder, dense or int8, frozen and in evaluation mode.

    Args:
        folder: a model's `transformer` folder.
        dtype: of what is not int8; None keeps what is stored.
        device: where to.
        waiting: first parts of names that go back to RAM, once they were quantised on the device.

    Raises:
        ModelError: see `stream_int8`.
    """
    transformer = empty_int8(folder)
    transformer.register_to_config(_name_or_path=str(folder))  # as diffusers does, for errors
    for name, tensor in stream_int8(folder, transformer, device):
        path, _, attribute = name.rpartition(".")
        module = transformer.get_submodule(path)
        quantised = isinstance(module, Int8Linear) and attribute != "bias"
        value = tensor if quantised or dtype is None else tensor.to(dtype)
        value = value.cpu() if name.startswith(waiting) else value
        is_parameter = attribute in module._parameters
        setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return transformer.eval()


def write_int8(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write an int8 transformer folder in shards of at most `SHARD_BYTES` (or one tensor).

    Args:
        folder: created; call it inside a staged folder.
        config: the transformer's config.json.
        tensors: (name, tensor) pairs of the int8 transformer, e.g. `stream_int8` of another folder.
    """
    folder.mkdir()
    shards = [list(shard) for shard in _written(folder, tensors)]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = numbered(number, len(shards))
        (folder / f"{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    atomic_write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}  # a place on this machine
    atomic_write_json(folder / "config.json", {**kept, "quantization_config": _MARK})


def share_equal(folder: Path, other: Path) -> list[str]:
    """Leave out of an int8 folder the tensors that another one beside it has too: its index names the other's files.

    Args:
        folder: as `write_int8` left it, in one shard.
        other: such a folder, which `folder` cannot be moved away from any more.

    Returns:
        Names of the tensors that `folder` no longer stores, all of an int8 layer or none.
    """
    own, theirs, read = tensor_files(folder), tensor_files(other), _reader()
    layers = {name.rpartition(".")[0] for name in own}
    parts = {layer: [name for name in own if name.rpartition(".")[0] == layer] for layer in layers}

    def equal(name: str) -> bool:
        return name in theirs and torch.equal(read(own[name], name), read(theirs[name], name))

    shared = {name for names in parts.values() if all(map(equal, names)) for name in names}
    kept = {name: read(file, name).clone() for name, file in own.items() if name not in shared}
    for file in set(own.values()):
        file.unlink()
    single = numbered(1, 1)
    atomic_save_safetensors(kept, folder / single)
    there = {name: os.path.relpath(theirs[name], folder).replace(os.sep, "/") for name in shared}
    table = {name: there.get(name, single) for name in own}
    atomic_write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {}, "weight_map": table})
    if (folder.parent / CHECKSUMS).is_file():
        write_all_checksums(folder.parent)
    return sorted(shared)


def write_all_checksums(model: Path) -> None:
    """Writes the checksums of an int8 model's folder, of what it has of its neighbours too; see `write_checksums`."""
    write_checksums(model, _neighbours(model / "transformer"))


def _neighbours(folder: Path) -> list[Path]:
    """What the index of a transformer folder names elsewhere; nothing of a damaged index, whose reader says so."""
    try:
        return [file for file in weight_files(folder) if file.parent != folder]
    except ModelError:
        return []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files in a transformer folder, then those elsewhere that its index names; each sorted."""
    own = visible(folder, "*.safetensors")
    index = folder / named(f"{WEIGHTS}.safetensors.index.json", weight_variant(folder))
    listed = {str(file) for file in tensor_files(folder).values()} if index.is_file() else set()
    return own + [Path(file) for file in sorted(listed) if Path(file).parent != folder]


def _written(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """Writes 1.safetensors, 2.safetensors, …; gives the names in each."""
    shard: dict[str, Tensor] = {}
    number = 1
    for name, tensor in tensors:
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            atomic_save_safetensors(shard, folder / f"{number}.safetensors")
            yield list(shard)
            number, shard = number + 1, {}
        shard[name] = tensor
    atomic_save_safetensors(shard, folder / f"{number}.safetensors")
    yield list(shard)


def numbered(number: int, count: int) -> str:
    """The name of one of several files, counted from 1."""
    return f"{WEIGHTS}-{number:05d}-of-{count:05d}.safetensors"


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, the tensors of a file together: as the index says, or of the one file."""
    names = (f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}.safetensors")
    index, single = (folder / named(name, weight_variant(folder)) for name in names)
    if not index.is_file():
        with reading(single):
            return dict.fromkeys(RangedFile(single).ranges, single)
    return shard_files(index, neighbours=True)


def _reader() -> Callable[[Path, str], Tensor]:
    """Reads one tensor of a file, mapped alone. Each file's header is read once, not again for every tensor in it."""
    opened = lru_cache(maxsize=None)(RangedFile)

    def read(file: Path, name: str) -> Tensor:
        with reading(file):
            return opened(file).read(name)

    return read


def _check(name: str, tensor: Tensor, wanted: Tensor, folder: Path) -> None:
    if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
        found = f"{tuple(tensor.shape)} {tensor.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}"
        raise ModelError(f"{name} is {found}", where=folder, hint=_DIFFER)


def _refuse(what: str, names: Iterable[str], folder: Path) -> None:
    if found := sorted(names):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ModelError(f"{what}: {found[0]}{more}", where=folder, hint=_DIFFER)
