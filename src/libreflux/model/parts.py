"""A part's folder, looked at before diffusers or transformers open it.

Given something odd they ask the hub, unpickle, make as many layers as config.json says or go on without a vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors import SafetensorError

from libreflux.errors import ModelError
from libreflux.model.formats import check_plain
from libreflux.model.ranges import RangedFile
from libreflux.model.text import TextEncoders

COPY = "the file is missing or damaged: copy or download it again"

_PLAIN = re.compile(r"[^/\\]+\.safetensors")
_NEIGHBOUR = re.compile(r"\.\./\.\./[A-Za-z0-9][\w.-]*/transformer/[^/\\]+\.safetensors")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: no such file, or something else in it.
    """
    with reading(path):
        values = json.loads(path.read_text(encoding="utf-8"))
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
        raise ModelError("has no weight_map from tensors to files", where=index, mend=COPY)
    for name in table.values():
        if not _PLAIN.fullmatch(name) and not (neighbours and _NEIGHBOUR.fullmatch(name)):
            told = f"names {name!r}, which is no safetensors file in its folder"
            raise ModelError(told, where=index, mend="use the files as the model's makers published them")
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
    if (folder / "adapter_config.json").exists():  # transformers would open the model that it names, wherever it is
        raise ModelError("is an adapter, not a model", where=folder, mend="remove its adapter_config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key)):
            mend = f"remove {key}"
            raise ModelError(f"names code of the hub, {config[key]}", where=folder / "config.json", mend=mend)
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files |= set(shard_files(index, neighbours=neighbours).values())
    stored = 0
    for file in sorted(files):
        with reading(file):
            ranges = RangedFile(file).ranges
        stored += len(ranges)
        if not config.get("quantization_config"):
            check_plain(ranges, file)
    for key, value in config.items():
        if "layers" in key and isinstance(value, int) and value > stored > 0:
            told = f"{key} is {value}, but there are {stored} tensors"
            raise ModelError(told, where=folder / "config.json", mend="the weights and config.json differ")


def check_tokenizer(folder: Path, vocabularies: tuple[str, ...]) -> None:
    """Raises ModelError unless one of the files is there; transformers would go on with an empty vocabulary."""
    _check_is_there(folder)
    if not any((folder / name).is_file() for name in vocabularies):
        raise ModelError(f"has no {' and no '.join(vocabularies)}", where=folder, mend=COPY)


def check_fit(
    where: Path, transformer: FluxTransformer2DModel | None, vae: AutoencoderKL | None, text: TextEncoders | None
) -> None:
    """Raises ModelError where the parts that were opened, each of which loads, do not make one model."""
    if transformer is None:
        return
    config = transformer.config
    rotary = sum(axis // 2 * 2 for axis in config.axes_dims_rope)  # they turn pairs
    pairs = {"dimensions of the rotary embedding and of a head": (rotary, config.attention_head_dim)}
    if vae is not None:
        pairs["channels of transformer and VAE"] = (config.in_channels, 4 * vae.config.latent_channels)
    if text is not None:
        pairs["widths of transformer and T5"] = (config.joint_attention_dim, text.text_encoder_2.config.d_model)
        pairs["widths of transformer and CLIP"] = (config.pooled_projection_dim, text.text_encoder.config.hidden_size)
    for what, (one, other) in pairs.items():
        if one != other:
            raise ModelError(f"{what} differ: {one} and {other}", where=where, mend="use the parts of one model")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """What goes wrong with this file in the block, on one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
        raise ModelError(f"cannot be loaded ({type(error).__name__}: {error})", where=file, mend=COPY) from error


def _check_is_there(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError("no such folder", where=folder, mend="the model is not whole: copy or download it again")
