"""Open and save a model of the FLUX family: a diffusers folder plus `libreflux.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import PreTrainedTokenizerBase

from libreflux import plainjson
from libreflux.errors import ModelError, RecipeError
from libreflux.files import atomic_write_json, sha256_file, staged_dir
from libreflux.model.checksums import check_small, tell_unchecked, verified_part
from libreflux.model.device import pick_device, pick_dtype
from libreflux.model.facts import Facts, find_facts, read_facts, tell_facts, write_facts
from libreflux.model.finite import check_weights
from libreflux.model.int8 import dequantise_model, int8_layers
from libreflux.model.int8_files import METHOD, load_int8, stored_as, weight_files, write_all_checksums, write_int8
from libreflux.model.load import load_part, load_t5_tokenizer, load_text, one_line, quiet
from libreflux.model.locate import PARTS, locate, part_folder
from libreflux.model.parts import check_fit, check_layers, check_part, copy_part, json_object
from libreflux.model.single_file import (
    FACTS_KEY,
    TOKENIZERS,
    SingleFiles,
    TensorFile,
    file_config,
    load_transformer,
    load_vae,
    transformer_config,
)
from libreflux.model.text import TextEncoders

__all__ = [
    "Facts",
    "Model",
    "locate",
    "open_model",
    "open_t5_tokenizer",
    "read_facts",
    "save_model",
    "weights_hash",
    "write_facts",
]

ALL = ("transformer", "vae", "text")
_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

_INDEX: dict[str, Any] = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

_MASKED = "FluxTransformer2DModelWithMasking"
"""What the published LibreFLUX weights call their transformer: FLUX's, drawn under text padding `bias`."""


@dataclass
class Model:
    """A model in memory; a part that was not asked for is None.

    Attributes:
        facts: see `Facts`.
        scheduler: diffusers' own, for pipelines other than ours; ours follows `facts.shift`.
        name: what the user called it.
        path: its folder; None for a model that was built in memory.
    """

    facts: Facts
    transformer: FluxTransformer2DModel | None = None
    vae: AutoencoderKL | None = None
    text: TextEncoders | None = None
    scheduler: FlowMatchEulerDiscreteScheduler = field(default_factory=FlowMatchEulerDiscreteScheduler)
    name: str = "unnamed"
    path: Path | None = None


def open_model(
    name: str | Path | SingleFiles,
    *,
    parts: Sequence[str] = ALL,
    dtype: torch.dtype | str | None = None,
    quantise: bool | None = None,
    device: torch.device | str = "cpu",
    text_by_block: bool = False,
) -> Model:
    """Load a model, in evaluation mode; each tensor goes to the device as it is read.

    Args:
        name: see `locate`; or single files.
        parts: any of "transformer", "vae", "text".
        dtype: of the weights, in an int8 transformer of those that are not int8; torch's or its name ("bfloat16",
            "bf16"); None keeps what is stored, in a single file of several dtypes the one that most numbers have. What
            the libraries keep in fp32 stays so.
        quantise: True: the transformer in int8, quantised tensor by tensor if it is stored otherwise; False: dense,
            scale * q where it is stored in int8; None: as stored.
        device: where to; "auto" as in `device.pick_device`.
        text_by_block: the text encoders rest on the CPU and compute on `device` block by block, see
            `by_block.run_by_block`.

    Raises:
        RecipeError: a dtype or a quantise that is none.
        ModelError: no such model, a part of another kind, or a damaged one.
        NotFiniteError: a weight is NaN or infinite.
    """
    if unknown := set(parts) - set(ALL):
        raise ValueError(f"unknown parts {sorted(unknown)}, wanted some of {ALL}")
    if quantise not in (None, True, False):
        raise RecipeError(f"cannot be {quantise!r}", where="quantise", mend="use True for int8, False or None")
    dtype, device = pick_dtype(dtype), pick_device() if device == "auto" else device
    if isinstance(name, SingleFiles):
        return _open_files(name, parts, dtype, bool(quantise), device, text_by_block)
    path = locate(name, weights=False)
    check_small(path)
    config = json_object(path / "transformer" / "config.json")
    check_layers(config, path / "transformer" / "config.json")
    if config.get("_class_name") not in ("FluxTransformer2DModel", _MASKED):
        mend = "use a model of the FLUX.1 family"
        raise ModelError(f"its transformer is a {config.get('_class_name')}", where=path, mend=mend)
    path = locate(name) if parts else path
    model = Model(
        facts=find_facts(
            str(name),
            path,
            guidance_embeds=bool(config.get("guidance_embeds", False)),
            masked=config.get("_class_name") == _MASKED,
        ),
        name=str(name),
        path=path,
    )
    if model.facts.guidance_embeds != bool(config.get("guidance_embeds", False)):
        raise ModelError(
            "guidance_embeds in libreflux.json is not the transformer's", where=path, mend="correct the file"
        )
    in_int8 = stored_as(config, path / "transformer" / "config.json") == METHOD
    with quiet():
        if (scheduler := part_folder(path, "scheduler")).is_dir():
            steps = json_object(scheduler / "scheduler_config.json").get("num_train_timesteps", 1000)
            if not isinstance(steps, int) or not 1 <= steps <= 1_000_000:  # a table of as many is made
                mend = "write 1000"
                raise ModelError(f"num_train_timesteps cannot be {steps!r}", where=scheduler, mend=mend)
            with verified_part(scheduler), one_line(scheduler):
                model.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler, local_files_only=True)
        if "transformer" in parts and (in_int8 or quantise):
            if in_int8:
                tell_unchecked(path)
            check_part(path / "transformer", neighbours=in_int8)
            with one_line(path / "transformer"):
                model.transformer = load_int8(path / "transformer", dtype=dtype, device=device)
                if quantise is False:
                    dequantise_model(model.transformer, model.transformer.dtype)
        elif "transformer" in parts:
            model.transformer = load_part(FluxTransformer2DModel, path / "transformer", dtype, device)
        if "vae" in parts:
            model.vae = load_part(AutoencoderKL, part_folder(path, "vae"), dtype, device)
        if "text" in parts:
            places = {part: part_folder(path, part) for part in _TEXT}
            model.text = load_text(places, dtype, device, by_block=text_by_block)
    if model.transformer is not None:
        tell_facts(model.transformer, model.facts)
    _check_finite(model, path)
    check_fit(path, model.transformer, model.vae, model.text)
    return model


def open_t5_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """T5's tokenizer of a model, see `locate`, without a weight.

    Raises:
        ModelError: no such model, or no tokenizer in it.
    """
    return load_t5_tokenizer(part_folder(locate(name, weights=False), "tokenizer_2"))


def _open_files(
    files: SingleFiles,
    parts: Sequence[str],
    dtype: torch.dtype | None,
    quantise: bool,
    device: torch.device | str,
    text_by_block: bool,
) -> Model:
    """A model of single files, and of its base for the rest."""
    given = TensorFile(files.transformer, "transformer")
    base = None if files.base is None else open_model(files.base, parts=())
    base_config = None if base is None or base.path is None else json_object(base.path / "transformer" / "config.json")
    config = transformer_config(given, base_config)
    facts = _file_facts(given, base, bool(config.get("guidance_embeds", False)))
    model = Model(facts=facts, name=str(files), path=files.transformer)
    wanted = [part for part in _TEXT if "text" in parts] + [part for part in ("vae",) if part in parts]
    where = places_of(files, wanted)
    if "transformer" in parts:
        model.transformer = load_transformer(given, config, dtype=dtype, quantise=quantise, device=device)
        tell_facts(model.transformer, facts)
    with quiet():
        if isinstance(vae := where.get("vae"), TensorFile):
            model.vae = load_vae(vae, file_config(vae, "vae"), dtype, device)
        elif vae is not None:
            model.vae = load_part(AutoencoderKL, vae, dtype, device)
        if "text" in parts:
            model.text = load_text(where, dtype, device, by_block=text_by_block)
    _check_finite(model, where | {"transformer": files.transformer})
    check_fit(files.transformer, model.transformer, model.vae, model.text)
    return model


def _check_finite(model: Model, where: Path | Mapping[str, Path | TensorFile]) -> None:
    """Before anything is computed: attention makes nothing of a NaN in q or k, and the picture looks like another.

    Text encoders of which only one block is in memory at a time are not read for it.
    """
    for part, module in _live_parts(model).items():
        if isinstance(module, torch.nn.Module):
            place = where / part if isinstance(where, Path) else where[part]
            check_weights(module.state_dict(), place.path if isinstance(place, TensorFile) else place)


def places_of(files: SingleFiles, wanted: Sequence[str]) -> dict[str, Path | TensorFile]:
    """Part -> its file, or its folder; of a base on the hub only what no file has is downloaded."""
    where: dict[str, Path | TensorFile] = {}
    for part in wanted:
        if (held := getattr(files, part) if part in TOKENIZERS else files.holder(part)) is not None:
            where[part] = held
    if lacking := [part for part in wanted if part not in where]:
        if files.base is None:
            mend = "name with --base a model that has it, or with --comfyui a folder of such files"
            raise ModelError(f"no {lacking[0]} in this file", where=files.transformer, mend=mend)
        folder = locate(files.base, weights=lacking)
        where |= {part: part_folder(folder, part) for part in lacking}
    return where


def _file_facts(file: TensorFile, base: Model | None, guidance_embeds: bool) -> Facts:
    """As the file's own metadata say, else its base's, else the nearest with a notice."""
    if own := file.metadata.get(FACTS_KEY):
        try:
            return Facts.from_dict(plainjson.parse(own), file.path)
        except ValueError as error:
            mend = "copy the file again"
            raise ModelError(f"damaged facts in its metadata ({error})", where=file.path, mend=mend) from None
    if base is not None and base.facts.guidance_embeds == guidance_embeds:
        return dataclasses.replace(base.facts, lineage={}, parts_from=None)
    return find_facts(str(file.path), file.path, guidance_embeds=guidance_embeds)


def part_config(model: Model, part: str) -> dict[str, Any]:
    """config.json of a model's transformer, VAE or text encoder, of the live part or from disk."""
    live = _live_parts(model).get(part)
    if live is not None:
        return {str(key): value for key, value in dict(live.config).items()}
    if model.path is None:
        raise ModelError(f"has no {part}", where=model.name, mend="open it with all its parts")
    return json_object(part_folder(model.path, part) / "config.json")


def save_model(model: Model, out: Path, extras: Mapping[str, str] | None = None) -> Path:
    """Write a model as a folder that `open_model` and, unless it is int8, diffusers' `FluxPipeline` load.

    Parts that are not in memory are copied from `model.path`. The folder appears complete or not at all.

    Args:
        model: what to write.
        out: the folder.
        extras: further files, name -> text.

    Raises:
        ModelError: a part is neither in memory nor on disk.
        NotFiniteError: a weight in memory is not finite.
        RunError: `out` exists.
    """
    with staged_dir(Path(out)) as staging, quiet():
        live = _live_parts(model)
        for part, module in live.items():  # again: it was merged, or trained
            if isinstance(module, torch.nn.Module):
                check_weights(module.state_dict(), f"{model.name}, {part}")
        for part in PARTS:
            if part == "transformer" and part in live and int8_layers(live[part]):
                write_int8(staging / part, json.loads(live[part].to_json_string()), live[part].state_dict().items())
            elif part in live:
                live[part].save_pretrained(staging / part)
            elif model.path is not None and (stored := part_folder(model.path, part)).is_dir():
                copy_part(stored, staging / part)
            else:
                raise ModelError(f"has no {part} to save", where=model.name, mend="open it with all its parts")
        index = {**_INDEX, "_diffusers_version": diffusers.__version__}
        atomic_write_json(staging / "model_index.json", index)
        write_facts(staging, dataclasses.replace(model.facts, parts_from=None))
        for name, content in (extras or {}).items():
            (staging / name).write_text(content, encoding="utf-8")
        if "transformer" in live and int8_layers(live["transformer"]):
            write_all_checksums(staging)
    return Path(out)


def weights_hash(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 over the transformer's safetensors files, names included, or of its single file: which weights drew.

    Args:
        folder: the model's, or the file.
        sha256: of one file; a memory's reads no file twice, see `data.digests`.
    """
    if folder.is_file():
        return sha256(folder)
    digest = hashlib.sha256()
    for file in weight_files(folder / "transformer"):
        digest.update(f"{file.name}:{sha256(file)}\n".encode())
    return digest.hexdigest()


def _live_parts(model: Model) -> dict[str, Any]:
    live: dict[str, Any] = {"transformer": model.transformer, "vae": model.vae, "scheduler": model.scheduler}
    if model.text is not None:
        live |= {part: getattr(model.text, part) for part in PARTS if part.startswith(("text_encoder", "tokenizer"))}
    return {name: part for name, part in live.items() if part is not None}
