"""A part's folder, looked at before diffusers or transformers open it.

Given something odd they ask the hub, unpickle, make as many layers as config.json says or go on without a vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.model.checksums import verified_part
from libreflux.model.locate import FOREIGN_HINT, foreign_format
from libreflux.model.quantised_files import check_plain
from libreflux.model.ranges import RangedFile
from libreflux.printing import counted, get_logger

logger = get_logger(__name__)

COPY = "the file is missing or damaged: copy or download it again"

MOST_LAYERS = 1000
MOST_WIDTH = 2**20
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANT = re.compile(rf"(?:{'|'.join(_STEMS)})\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)", re.ASCII)
_PLAIN = re.compile(r"[^/\\]+\.safetensors")
_NEIGHBOUR = re.compile(r"\.\./\.\./[A-Za-z0-9][\w.-]*/transformer/[^/\\]+\.safetensors")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: no such file, or something else in it.
    """
    with reading(path):
        values = plainjson.parse(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values


def shard_files(index: Path, *, neighbours: bool = False) -> dict[str, Path]:
    """Tensor name -> file, as a shard index says.

    Args:
        index: `….safetensors.index.json`.
        neighbours: a file may also be in the transformer folder of a model beside this one.

    Raises:
        ModelError: not an index, or one that names a file elsewhere or of another kind.
    """
    table = json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError("has no weight_map from tensors to files", where=index, hint=COPY)
    for name in table.values():
        if not _PLAIN.fullmatch(name) and not (neighbours and _NEIGHBOUR.fullmatch(name)):
            told = f"names {name!r}, which is no safetensors file in its folder"
            raise ModelError(told, where=index, hint="use the files as the model's makers published them")
    return {name: index.parent / table[name] for name in sorted(table, key=lambda name: (table[name], name))}


def check_part(folder: Path, *, neighbours: bool = False) -> None:
    """Looks at a part with weights: config.json, the headers of its files, the shards that its index names.

    Args:
        folder: the part's.
        neighbours: see `shard_files`.

    Raises:
        ModelError: what is wrong with which file.
    """
    _check_is_there(folder)
    config = json_object(folder / "config.json")
    if told := foreign_format(config):
        raise ModelError(f"is quantised by {told}, which is not read", where=folder, hint=FOREIGN_HINT)
    if (folder / "adapter_config.json").exists():  # transformers would open the model that it names, wherever it is
        raise ModelError("is an adapter, not a model", where=folder, hint="remove its adapter_config.json")
    for key, value in _attention(config):
        if "/" in value:
            raise ModelError(f"names code of the hub, {value}", where=folder / "config.json", hint=f"remove {key}")
    if variant := weight_variant(folder):
        _tell_variant(str(folder), variant)
    files = set(visible(folder, "*.safetensors"))
    for index in visible(folder, "*.safetensors.index*.json"):
        files |= set(shard_files(index, neighbours=neighbours).values())
    stored = 0
    for file in sorted(files):
        with reading(file):
            ranges = RangedFile(file).ranges
        stored += len(ranges)
        if not config.get("quantization_config"):
            check_plain(ranges, file)
    check_layers(config, folder / "config.json", stored or MOST_LAYERS)


def check_layers(config: Mapping[str, Any], where: object, stored: int | None = None) -> None:
    """Raises ModelError for more layers than there are tensors (None: than any model has): each would be made."""
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and value > (stored or MOST_LAYERS):
            told = f"{key} is {value}, but it has {counted(stored, 'tensor')}" if stored else f"{key} cannot be {value}"
            raise ModelError(told, where=where, hint="the weights and config.json differ")


def check_widths(config: Mapping[str, Any], where: object) -> None:
    """Raises ModelError for a width in a transformer's configuration that no model has."""
    for key in _FLUX_WIDTHS.keys() & config.keys():
        value = config[key]
        if not isinstance(value, int) or not 1 <= value <= MOST_WIDTH:
            raise ModelError(f"{key} cannot be {value!r}", where=where, hint=COPY)


def _attention(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Which attention a configuration, or one within it, wants: transformers downloads it where that is a hub's."""
    for key, value in config.items():
        if key in ("attn_implementation", "_attn_implementation"):
            yield key, str(value)
        elif isinstance(value, dict):
            yield from _attention(value)


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, sorted, but for `._name`: macOS leaves them beside files on other disks."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("._"))


def weight_variant(folder: Path) -> str | None:
    """None where a part has weights under their plain names, else e.g. "fp16" where only such a variant is there."""
    names = {file.name for file in visible(folder, "*.safetensors*")}
    if any(f"{stem}{end}" in names for stem in _STEMS for end in (".safetensors", ".safetensors.index.json")):
        return None
    return min((match[1] or match[2] for name in names if (match := _VARIANT.fullmatch(name))), default=None)


def named(name: str, variant: str | None) -> str:
    """A file's name in a variant: model.safetensors -> model.fp16.safetensors, as diffusers and transformers do."""
    start, dot, end = name.rpartition(".")
    return name if variant is None else f"{start}.{variant}{dot}{end}"


def copy_part(source: Path, target: Path) -> None:
    """Copies a part's folder, following the links of the hub's cache; a lone variant gets the plain names."""
    with verified_part(source):  # or the copy would get checksums of what is damaged
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("._*", ".DS_Store"))
    variant = weight_variant(target)
    for stem in _STEMS if variant else ():
        for plain in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (file := target / named(plain, variant)).is_file():
                file.rename(target / plain)


@functools.cache  # a command opens a part more than once
def _tell_variant(folder: str, variant: str) -> None:
    logger.warning("%s has its weights as the variant %s alone: that is read", folder, variant)


def check_tokenizer(folder: Path, vocabularies: tuple[str, ...]) -> None:
    """Raises ModelError unless one of the files is there; transformers would go on with an empty vocabulary."""
    _check_is_there(folder)
    if not any((folder / name).is_file() for name in vocabularies):
        raise ModelError(f"has no {' and no '.join(vocabularies)}", where=folder, hint=COPY)


def check_fit(where: Path, transformer: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ModelError where parts, each of which loads, do not make one model.

    Args:
        where: the model.
        transformer: its configuration.
        parts: the configurations of "vae", "text_encoder" and "text_encoder_2", of those that there are. A key that a
            configuration lacks has its library's default.
    """
    config = {**_FLUX_DEFAULTS, **transformer}
    pairs = {"dimensions of the rotary embedding and of a head": (_rotary(config), config["attention_head_dim"])}
    if (vae := parts.get("vae")) is not None:
        channels = vae.get("latent_channels", 4)
        pairs["channels of transformer and VAE"] = (config["in_channels"], channels and 4 * channels)
    if (t5 := parts.get("text_encoder_2")) is not None:
        pairs["widths of transformer and T5"] = (config["joint_attention_dim"], t5.get("d_model", 512))
    if (clip := parts.get("text_encoder")) is not None:
        pairs["widths of transformer and CLIP"] = (config["pooled_projection_dim"], clip.get("hidden_size", 512))
    for what, (one, other) in pairs.items():
        if one != other:
            raise ModelError(f"{what} differ: {one} and {other}", where=where, hint="use the parts of one model")


_FLUX_WIDTHS = {"attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
_FLUX_DEFAULTS: dict[str, Any] = {"axes_dims_rope": (16, 56, 56), **_FLUX_WIDTHS}
"""Of diffusers' FluxTransformer2DModel."""


def _rotary(config: Mapping[str, Any]) -> Any:
    """The dimensions that the rotary embedding turns, which are pairs."""
    axes = config["axes_dims_rope"]
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        return axes
    return sum(axis // 2 * 2 for axis in axes)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What goes wrong with this file in the block, on one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(f"cannot be loaded ({type(error).__name__}: {error})", where=file, hint=COPY) from error


def _check_is_there(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError("no such folder", where=folder, hint="the model is not whole: copy or download it again")
