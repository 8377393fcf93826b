"""Adapter files, in LyCORIS' names: read, written, and put on a transformer; see `formats` for other programs' names.

A tensor is called `lycoris_<layer name with _ for .>.` and then `lokr_w1`, `lokr_w2` or `alpha`. The layer's name
cannot be read back from that without the model, so our files also carry a key map (JSON: prefix -> layer name) in the
safetensors metadata. Files without one are matched with the names of the model's own layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from libreflux import plainjson
from libreflux.adapter import peft
from libreflux.adapter.adapter import Adapter, device_of, install, some_names
from libreflux.adapter.formats import LYCORIS, lycoris_name, read_names
from libreflux.adapter.layers import AdaptedLinear, delta_from_tensors, features, linears
from libreflux.adapter.reading import check_strength, prepared
from libreflux.errors import AdapterError
from libreflux.files import sha256_file
from libreflux.model.stream import save_live
from libreflux.places import did_you_mean

PREFIX = LYCORIS
SCHEMA = "1"
ROLE, TRAINING_ADAPTER = "role", "training_adapter"
"""A key of the metadata that says what an adapter is for, and its one value; an ordinary adapter has no such key."""


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

    @property
    def is_training_adapter(self) -> bool:
        """Whether it says that it is on a model only while another adapter is trained; see `ROLE`."""
        return self.metadata.get(ROLE) == TRAINING_ADAPTER

    def by_layer(self, layer_names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Layer name -> suffix -> tensor, for the model that has these linears.

        Raises:
            AdapterError: a tensor belongs to no layer, or its spelling fits two.
        """
        known = _by_prefix(layer_names)
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
                f"tensors that fit no linear layer of this model: {some_names(leftover)}",
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


def _by_prefix(layer_names: Iterable[str]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for name in layer_names:
        known.setdefault(lycoris_name(name), []).append(name)
    return known


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
    transformer: nn.Module,
    path: Path | str | AdapterFile,
    weight: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Adapter:
    """Freeze a transformer and put an adapter file on it.

    What it was trained for is not the transformer's to know: use its steps, guidance and text padding, see
    `adapter.facts.adapted_facts`. A pipeline's `load_lora_weights` does both.

    Args:
        transformer: the model.
        path: an adapter file, or one that is read already.
        weight: strength of the adapter.
        dtype: of the adapter's parameters; None keeps the file's.
        device: of the adapter's parameters; None: where each layer is.

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
        layers[name] = AdaptedLinear(base, delta.to(device=device_of(base) if device is None else device), weight)
        layers[name].origin = file.where
    return install(transformer, {name: layers[name] for name in found if name in layers})
