"""Reading, writing and attaching adapter files, in LyCORIS' names; other programs' are read too, see `spelling`.

A tensor is called `lycoris_<layer name with _ for .>.` and then `lokr_w1`, `lokr_w2` or `alpha`. That spelling cannot
be undone without the model, so our files also carry a key map (JSON: prefix -> layer name) in the safetensors metadata;
files without one are matched by spelling the model's own layer names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from libreflux import plainjson
from libreflux.adapter import peft
from libreflux.adapter.formats import LYCORIS, lycoris_name, read_names
from libreflux.adapter.init import Kind, init_lokr, init_lora
from libreflux.adapter.layers import AdaptedLinear, LoKr, LoRA, delta_from_tensors, features, linears
from libreflux.adapter.reading import check_strength, prepared
from libreflux.adapter.targets import Resolved
from libreflux.errors import AdapterError
from libreflux.files import sha256_file
from libreflux.model.stream import save_live
from libreflux.places import did_you_mean

PREFIX = LYCORIS
SCHEMA = "1"


class Adapter:
    """The adapted layers of one adapter on one transformer; the transformer itself is frozen.

    Attributes:
        layers: layer name -> AdaptedLinear, in the model's order.
    """

    def __init__(self, transformer: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
        self.transformer = transformer
        self.layers = dict(layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(`<layer name>.lokr_w1`, parameter) pairs, in the model's order."""
        for name, layer in self.layers.items():
            for suffix, parameter in layer.delta.named_parameters():
                yield f"{name}.{suffix}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def key_map(self) -> dict[str, str]:
        """LyCORIS prefix -> layer name."""
        return {lycoris_name(name): name for name in self.layers}

    def state_dict(self) -> dict[str, Tensor]:
        """LyCORIS name -> tensor, sharing storage with the parameters."""
        return {
            f"{lycoris_name(name)}.{suffix}": tensor
            for name, layer in self.layers.items()
            for suffix, tensor in layer.delta.tensors().items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy back what `state_dict` gave, to the bit: a LoRA's alpha too.

        Raises:
            AdapterError: a missing or leftover key, or another shape or dtype.
        """
        own = self.state_dict()
        missing, leftover = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        if missing or leftover:
            raise AdapterError(
                f"missing {_some(missing)}; leftover {_some(leftover)}",
                hint="load it with the recipe it was trained by",
            )
        for key, tensor in tensors.items():
            if (tensor.shape, tensor.dtype) != (own[key].shape, own[key].dtype):
                found, wanted = f"{tuple(tensor.shape)} {tensor.dtype}", f"{tuple(own[key].shape)} {own[key].dtype}"
                raise AdapterError(f"is {found}, should be {wanted}", where=key)
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
        for name, layer in self.layers.items():
            key = f"{lycoris_name(name)}.alpha"  # fp32 there, the live one is a double: equal ones stay as they are
            if isinstance(layer.delta, LoRA) and not torch.equal(tensors[key], torch.tensor(layer.delta.alpha)):
                layer.delta.rescale(float(tensors[key]))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The transformer without this adapter while the block runs; other adapters on the same layers stay.

        Only for forward passes that end inside the block: gradient checkpointing would compute the blocks again,
        in a later backward, with the adapter on. Take no gradient in it.
        """
        before = [layer.enabled for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
                layer.enabled = enabled

    def detach(self) -> None:
        """Take the adapter off again; other adapters on the same layers stay."""
        for name, layer in self.layers.items():
            parent, child = _parent(self.transformer, name)
            at: nn.Module = getattr(parent, child)
            if at is layer:
                setattr(parent, child, layer.base)
                continue
            while isinstance(at, AdaptedLinear) and at.base is not layer:
                at = at.base
            if not isinstance(at, AdaptedLinear):
                raise AdapterError("this adapter is not attached here any more", where=name)
            at.base = layer.base


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, read into memory.

    Attributes:
        where: the file, for errors.
        tensors: LyCORIS name -> tensor.
        metadata: the safetensors metadata, strings.
        sha256: of the file's bytes when they were read; a run in progress may replace it.
    """

    where: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str = ""

    def by_layer(self, layer_names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Layer name -> suffix -> tensor, for the model that has these linears.

        Raises:
            AdapterError: a tensor belongs to no layer, or its spelling fits two.
        """
        known = _spellings(layer_names)
        stored = self.layer_names()
        layers: dict[str, dict[str, Tensor]] = {}
        leftover = []
        for key, tensor in self.tensors.items():
            prefix, _, suffix = key.partition(".")
            names = known.get(prefix, [])
            if stored.get(prefix) in names:
                names = [stored[prefix]]
            if len(names) > 1:
                raise AdapterError(f"{prefix} could be {' or '.join(names)}", where=self.where)
            if not names or not suffix:
                leftover.append(key)
            else:
                layers.setdefault(names[0], {})[suffix] = tensor
        if leftover:
            raise AdapterError(
                f"tensors that fit no linear layer of this model: {_some(leftover)}",
                where=self.where,
                hint="attach it to the kind of model it was trained on",
            )
        return layers

    def layer_names(self) -> dict[str, str]:
        """LyCORIS prefix -> layer name, as the file or its reader says; empty for a file of lycoris-lora's own."""
        try:
            told = plainjson.parse(self.metadata.get("key_map", "{}"))
            return {str(prefix): str(name) for prefix, name in told.items()}
        except (ValueError, AttributeError):
            raise AdapterError("unreadable key_map in its metadata", where=self.where, hint="copy it again") from None


def _spellings(layer_names: Iterable[str]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for name in layer_names:
        known.setdefault(lycoris_name(name), []).append(name)
    return known


def _some(keys: Sequence[str], count: int = 3) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return (", ".join(keys[:count]) or "nothing") + more


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, child = name.rpartition(".")
    return root.get_submodule(path), child


def _device(module: nn.Module) -> torch.device | None:
    first = next(chain(module.parameters(), module.buffers()), None)
    return None if first is None else first.device


def attach(
    transformer: nn.Module,
    resolved: Sequence[Resolved],
    *,
    dtype: torch.dtype = torch.float32,
    init: Kind = "perturbed",
    seed: int = 0,
    scale: float = 1e-3,
) -> Adapter:
    """Freeze a transformer and put a new LoKr or LoRA on each resolved layer.

    Args:
        transformer: any module whose linears were resolved.
        resolved: from `targets.resolve`.
        dtype: of the adapter's parameters, fp32 or bf16.
        init: of a LoKr, see `init.init_lokr`; a LoRA has the one start of `init.init_lora`.
        seed: of the run.
        scale: of the perturbed init.

    Returns:
        The adapter, whose parameters are the only ones that require gradients.
    """
    found = linears(transformer)
    layers: dict[str, AdaptedLinear] = {}
    for row in resolved:
        base = found.get(row.name)
        if base is None or features(base) != (row.in_features, row.out_features):
            raise AdapterError("was resolved for another model", where=row.name, hint="resolve the targets again")
        size: tuple[int, int] = (row.in_features, row.out_features)
        if row.rank is not None:
            lora = LoRA(*size, row.rank, alpha=row.alpha, dtype=dtype, device=_device(base))
            layers[row.name] = AdaptedLinear(base, lora)
            init_lora(lora, seed, row.name)
        elif row.factor is not None:
            layers[row.name] = AdaptedLinear(base, LoKr(*size, row.factor, dtype=dtype, device=_device(base)))
            init_lokr(layers[row.name], init, seed, row.name, scale)
        else:
            raise AdapterError("comes from a file", where=row.name, hint="attach the file")
    return _install(transformer, layers)


def _install(transformer: nn.Module, layers: Mapping[str, AdaptedLinear]) -> Adapter:
    transformer.requires_grad_(False)
    for name, layer in layers.items():
        parent, child = _parent(transformer, name)
        setattr(parent, child, layer)
    return Adapter(transformer, layers)


def save_adapter(adapter: Adapter, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter file, atomically.

    Args:
        adapter: attached or not.
        path: ends in .safetensors.
        metadata: further strings for the file (model, hashes, steps); `schema` and `key_map` are ours.
    """
    save_live(path, adapter.state_dict(), {**(metadata or {}), **file_metadata(adapter)})


def file_metadata(adapter: Adapter) -> dict[str, str]:
    """The metadata that a file of this adapter's tensors needs to be read: `schema` and `key_map`."""
    return {"schema": SCHEMA, "key_map": json.dumps(adapter.key_map(), sort_keys=True)}


def load_adapter(path: Path | str) -> AdapterFile:
    """Read an adapter file: ours, or one of LyCORIS', diffusers', PEFT's or kohya's, in LyCORIS' names.

    Tensors for text encoders are left out, with a warning.

    Args:
        path: the file; or a folder of PEFT's or diffusers' that holds one.

    Raises:
        AdapterError: no such file, not safetensors, names that are no FLUX layer's, a scale that nothing tells, or a
            later schema.
        NotFiniteError: NaN or infinite numbers in it.
    """
    path = Path(path)
    path = (path.is_dir() and peft.file_in(path)) or path
    if not path.is_file():
        raise AdapterError("no such adapter file", where=path, hint=did_you_mean(path, "give a .safetensors file"))
    try:
        before = path.stat()
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
        digest, after = sha256_file(path), path.stat()
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            raise FileNotFoundError
    except FileNotFoundError:  # a checkpoint of a run in progress
        raise AdapterError("was replaced or removed while it was read", where=path, hint="run this again") from None
    except safetensors.SafetensorError as error:
        raise AdapterError(f"not a whole safetensors file ({error})", where=path, hint="copy it again") from error
    if metadata.get("schema", SCHEMA) != SCHEMA:
        raise AdapterError(
            f"schema {metadata['schema']} is newer than this version", where=path, hint="update libreflux"
        )
    tensors = prepared(tensors, str(path))
    if not tensors:
        raise AdapterError("no tensors for a transformer in it", where=path, hint="give an adapter of FLUX.1")
    if any(not key.startswith(PREFIX) for key in tensors) or _names_bfl(tensors):
        tensors, key_map = read_names(tensors, peft.config_of(path, metadata), str(path))
        metadata["key_map"] = json.dumps(key_map, sort_keys=True)
    return AdapterFile(str(path), tensors, metadata, digest)


def _names_bfl(tensors: Iterable[str]) -> bool:
    return any(key.startswith((f"{PREFIX}double_blocks_", f"{PREFIX}single_blocks_")) for key in tensors)


def attach_file(
    transformer: nn.Module, path: Path | str | AdapterFile, weight: float = 1.0, *, dtype: torch.dtype | None = None
) -> Adapter:
    """Freeze a transformer and put an adapter file on it.

    Args:
        transformer: the model.
        path: an adapter file, or one that is read already.
        weight: strength of the adapter.
        dtype: of the adapter's parameters; None keeps the file's.

    Raises:
        AdapterError: the file is broken, does not fit this model, or changes it beyond all numbers; the model is then
            as before.
    """
    found = linears(transformer)
    layers = {}
    file = path if isinstance(path, AdapterFile) else load_adapter(path)
    for name, tensors in file.by_layer(found).items():
        base = found[name]
        delta = delta_from_tensors(tensors, *features(base), f"{file.where}, {name}", dtype=dtype)
        check_strength(delta, weight, f"{file.where}, {name}")
        layers[name] = AdaptedLinear(base, delta.to(device=_device(base)), weight)
        layers[name].origin = file.where
    return _install(transformer, {name: layers[name] for name in found if name in layers})
