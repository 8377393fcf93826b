"""A model of the FLUX family on disk: known at once, loaded part by part, and written as a folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
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
from libreflux.model.parts import check_fit, check_layers, check_part, check_widths, copy_part, json_object
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
    "ModelSource",
    "locate",
    "open_model",
    "open_t5_tokenizer",
    "read_facts",
    "save_model",
    "weights_hash",
    "write_facts",
]

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
Device = torch.device | str

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


class ModelSource:
    """A model on disk, see `open_model`. Nothing of its weights is read before a part is loaded.

    Attributes:
        name: what the user called it.
        path: its folder, or its transformer's single file.
        facts: how it is used, see `Facts`.
        config: the transformer's configuration.
    """

    name: str
    path: Path
    facts: Facts
    config: Mapping[str, Any]

    def __init__(self, name: str, path: Path, facts: Facts, config: Mapping[str, Any]) -> None:
        self.name, self.path, self.facts, self.config = name, path, facts, config

    def with_facts(self, facts: Facts) -> ModelSource:
        """The same model, used in another way, e.g. under adapters."""
        changed = copy.copy(self)
        changed.facts = facts
        return changed

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the transformer's weights, see `weights_hash`; reads all of them."""
        return weights_hash(self._with_weights("transformer"))

    @property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """diffusers' own, for pipelines other than ours; ours follows `facts.shift`."""
        return FlowMatchEulerDiscreteScheduler()

    def has(self, part: str) -> bool:
        """Whether the model has "vae" or one of `TEXT_PARTS`."""
        raise NotImplementedError

    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """Where "vae" and `TEXT_PARTS` are: their folders or files, with their weights.

        Raises:
            ModelError: there is no such part.
        """
        raise NotImplementedError

    def part_config(self, part: str) -> dict[str, Any]:
        """config.json of the transformer, the VAE or a text encoder.

        Raises:
            ModelError: there is no such part.
        """
        raise NotImplementedError

    def load_transformer(
        self, *, dtype: torch.dtype | str | None = None, quantise: bool | None = None, device: Device = "cpu"
    ) -> FluxTransformer2DModel:
        """The transformer in evaluation mode, without gradients; each tensor goes to the device as it is read.

        Args:
            dtype: of the weights, in an int8 transformer of those that are not int8; torch's or its name ("bfloat16",
                "bf16"); None keeps what is stored, in a single file of several dtypes the one that most numbers have.
                What the libraries keep in fp32 stays so.
            quantise: True: in int8, quantised tensor by tensor if it is stored otherwise; False: dense, scale * q where
                it is stored in int8; None: as stored.
            device: where to; "auto" as in `device.pick_device`.

        Raises:
            RecipeError: a dtype or a quantise that is none.
            ModelError: a damaged part, or parts that are not of one model.
            NotFiniteError: a weight is NaN or infinite.
        """
        if quantise not in (None, True, False):
            raise RecipeError(f"cannot be {quantise!r}", where="quantise", hint="use True for int8, False or None")
        chosen, place = pick_dtype(dtype), _device(device)
        check_fit(self.path, self.config, self._configs())
        with quiet():
            transformer = self._read_transformer(chosen, quantise, place)
        tell_facts(transformer, self.facts)
        check_weights(transformer.state_dict(), self._place("transformer"))
        return transformer

    def load_vae(self, *, dtype: torch.dtype | str | None = None, device: Device = "cpu") -> AutoencoderKL:
        """The VAE in evaluation mode; see `load_transformer`.

        Raises:
            ModelError: there is none, or a damaged one.
            NotFiniteError: a weight is NaN or infinite.
        """
        chosen, place = pick_dtype(dtype), _device(device)
        with quiet():
            vae = self._read_vae(chosen, place)
        check_weights(vae.state_dict(), self._place("vae"))
        return vae

    def load_text(
        self, *, dtype: torch.dtype | str | None = None, device: Device = "cpu", by_block: bool = False
    ) -> TextEncoders:
        """Both text encoders with their tokenizers, in evaluation mode; see `load_transformer`.

        Args:
            dtype, device: see `load_transformer`.
            by_block: they rest on the CPU and compute on `device` block by block, see `by_block.run_by_block`.

        Raises:
            ModelError: there are none, or a damaged one.
            NotFiniteError: a weight is NaN or infinite.
        """
        chosen, place = pick_dtype(dtype), _device(device)
        with quiet():
            text = self._read_text(chosen, place, by_block)
        for part in ("text_encoder", "text_encoder_2"):
            check_weights(getattr(text, part).state_dict(), self._place(part))
        return text

    def load_t5_tokenizer(self) -> PreTrainedTokenizerBase:
        """T5's tokenizer, without a weight.

        Raises:
            ModelError: there is none.
        """
        raise NotImplementedError

    def _configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the parts that it has; what is wrong with one is told when its part is loaded."""
        found: dict[str, Mapping[str, Any]] = {}
        for part in ("vae", "text_encoder", "text_encoder_2"):
            with contextlib.suppress(ModelError):
                found[part] = self.part_config(part)
        return found

    def _place(self, part: str) -> Path:
        """What a message names of a part."""
        raise NotImplementedError

    def _with_weights(self, *parts: str) -> Path:
        """`path`, once the weights of these parts are on disk."""
        return self.path

    def _read_transformer(
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device
    ) -> FluxTransformer2DModel:
        raise NotImplementedError

    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        raise NotImplementedError

    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        raise NotImplementedError


class FolderSource(ModelSource):
    """A diffusers folder."""

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """As it is in the folder, or diffusers' own."""
        folder = part_folder(self.path, "scheduler")
        if not folder.is_dir():
            return FlowMatchEulerDiscreteScheduler()
        steps = json_object(folder / "scheduler_config.json").get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or not 1 <= steps <= 1_000_000:  # a table of as many is made
            raise ModelError(f"num_train_timesteps cannot be {steps!r}", where=folder, hint="write 1000")
        with quiet(), verified_part(folder), one_line(folder):
            return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True)

    def has(self, part: str) -> bool:
        """See `ModelSource.has`."""
        return part_folder(self.path, part).is_dir()

    def part_config(self, part: str) -> dict[str, Any]:
        """See `ModelSource.part_config`."""
        return json_object(part_folder(self.path, part) / "config.json")

    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """See `ModelSource.places`."""
        path = self._with_weights(*parts)
        return {part: part_folder(path, part) for part in parts}

    def load_t5_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `ModelSource.load_t5_tokenizer`."""
        return load_t5_tokenizer(part_folder(self.path, "tokenizer_2"))

    def _place(self, part: str) -> Path:
        return self.path / part

    def _with_weights(self, *parts: str) -> Path:
        return locate(self.name, weights=parts)

    def _read_transformer(
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device
    ) -> FluxTransformer2DModel:
        folder = self._with_weights("transformer") / "transformer"
        in_int8 = stored_as(self.config, folder / "config.json") == METHOD
        if not in_int8 and not quantise:
            loaded: FluxTransformer2DModel = load_part(FluxTransformer2DModel, folder, dtype, device)
            return loaded
        if in_int8:
            tell_unchecked(folder.parent)
        check_part(folder, neighbours=in_int8)
        with one_line(folder):
            transformer = load_int8(folder, dtype=dtype, device=device)
            if quantise is False:
                dequantise_model(transformer, transformer.dtype)
        return transformer

    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        vae: AutoencoderKL = load_part(AutoencoderKL, part_folder(self._with_weights("vae"), "vae"), dtype, device)
        return vae

    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        return load_text(self.places(*TEXT_PARTS), dtype, device, by_block=by_block)


class FilesSource(ModelSource):
    """Single files, and their base for the rest.

    Args:
        files: the files.
        base: the model that has what no file has; None without.
        facts: see `ModelSource`.
        config: see `ModelSource`.
    """

    def __init__(self, files: SingleFiles, base: ModelSource | None, facts: Facts, config: Mapping[str, Any]) -> None:
        super().__init__(str(files), files.transformer, facts, config)
        self._files, self._base = files, base

    def has(self, part: str) -> bool:
        """See `ModelSource.has`."""
        return self._held(part) is not None or (self._base is not None and self._base.has(part))

    def part_config(self, part: str) -> dict[str, Any]:
        """See `ModelSource.part_config`."""
        if part == "transformer":
            return dict(self.config)
        if isinstance(held := self._held(part), TensorFile):
            return file_config(held, part)
        return self._rest(part).part_config(part)

    def load_t5_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `ModelSource.load_t5_tokenizer`."""
        held = self._held("tokenizer_2")
        return self._rest("tokenizer_2").load_t5_tokenizer() if held is None else load_t5_tokenizer(Path(str(held)))

    def _held(self, part: str) -> TensorFile | Path | None:
        found: TensorFile | Path | None = getattr(self._files, part) if part in TOKENIZERS else self._files.holder(part)
        return found

    def _rest(self, part: str) -> ModelSource:
        if self._base is None:
            hint = "name with --base a model that has it, or with --comfyui a folder of such files"
            raise ModelError(f"no {part} in this file", where=self._files.transformer, hint=hint)
        return self._base

    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """See `ModelSource.places`; of a base on the hub only what no file has is downloaded."""
        found = {part: self._held(part) for part in parts}
        lacking = [part for part, held in found.items() if held is None]
        folder = self._rest(lacking[0])._with_weights(*lacking) if lacking else None
        return {
            part: held if held is not None else part_folder(folder, part)  # type: ignore[arg-type]
            for part, held in found.items()
        }

    def _place(self, part: str) -> Path:
        if part == "transformer":
            return self.path
        held = self._held(part)
        return self._rest(part)._place(part) if held is None else held.path if isinstance(held, TensorFile) else held

    def _read_transformer(
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device
    ) -> FluxTransformer2DModel:
        given = TensorFile(self._files.transformer, "transformer")
        return load_transformer(given, self.config, dtype=dtype, quantise=bool(quantise), device=device)

    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        vae = self.places("vae")["vae"]
        if isinstance(vae, TensorFile):
            return load_vae(vae, file_config(vae, "vae"), dtype, device)
        loaded: AutoencoderKL = load_part(AutoencoderKL, vae, dtype, device)
        return loaded

    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        return load_text(self.places(*TEXT_PARTS), dtype, device, by_block=by_block)


def open_model(name: str | Path | SingleFiles) -> ModelSource:
    """A handle on a model: located, looked at and told about once. Its parts are loaded when they are asked for.

    Args:
        name: "emoji-base" and its kin, a diffusers folder or a hub id, see `locate`; or single files.

    Raises:
        ModelError: no such model, or one that is no model of the FLUX family.
    """
    if isinstance(name, SingleFiles):
        return _open_files(name)
    path = locate(name, weights=False)
    check_small(path)
    where = path / "transformer" / "config.json"
    config = json_object(where)
    check_layers(config, where)
    check_widths(config, where)
    kind, guided = config.get("_class_name"), bool(config.get("guidance_embeds", False))
    if kind not in ("FluxTransformer2DModel", _MASKED):
        raise ModelError(f"its transformer is a {kind}", where=path, hint="use a model of the FLUX.1 family")
    facts = find_facts(str(name), path, guidance_embeds=guided, masked=kind == _MASKED)
    if facts.guidance_embeds != guided:
        what = "guidance_embeds in libreflux.json is not the transformer's"
        raise ModelError(what, where=path, hint="correct the file")
    stored_as(config, where)
    return FolderSource(str(name), path, facts, config)


def _open_files(files: SingleFiles) -> ModelSource:
    given = TensorFile(files.transformer, "transformer")
    base = None if files.base is None else open_model(files.base)
    config = transformer_config(given, None if base is None else base.config)
    facts = _file_facts(given, base, bool(config.get("guidance_embeds", False)))
    return FilesSource(files, base, facts, config)


def open_t5_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """T5's tokenizer of a model, see `locate`, without a weight.

    Raises:
        ModelError: no such model, or no tokenizer in it.
    """
    return load_t5_tokenizer(part_folder(locate(name, weights=False), "tokenizer_2"))


def _file_facts(file: TensorFile, base: ModelSource | None, guidance_embeds: bool) -> Facts:
    """As the file's own metadata say, else its base's, else the nearest with a notice."""
    if own := file.metadata.get(FACTS_KEY):
        try:
            return Facts.from_dict(plainjson.parse(own), file.path)
        except ValueError as error:
            hint = "copy the file again"
            raise ModelError(f"damaged facts in its metadata ({error})", where=file.path, hint=hint) from None
    if base is not None and base.facts.guidance_embeds == guidance_embeds:
        return dataclasses.replace(base.facts, lineage={}, parts_from=None)
    return find_facts(str(file.path), file.path, guidance_embeds=guidance_embeds)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LiveParts:
    """Parts in memory that `save_model` writes; what is None is copied from a source."""

    transformer: FluxTransformer2DModel | None = None
    vae: AutoencoderKL | None = None
    text: TextEncoders | None = None
    scheduler: FlowMatchEulerDiscreteScheduler | None = None

    def by_name(self) -> dict[str, Any]:
        """PARTS that are in memory."""
        live: dict[str, Any] = {"transformer": self.transformer, "vae": self.vae, "scheduler": self.scheduler}
        live |= {part: getattr(self.text, part, None) for part in TEXT_PARTS}
        return {name: part for name, part in live.items() if part is not None}


def save_model(
    out: Path, facts: Facts, live: LiveParts, source: ModelSource | None = None, extras: Mapping[str, str] | None = None
) -> Path:
    """Write a model as a folder that `open_model` and, unless it is int8, diffusers' `FluxPipeline` load.

    The folder appears complete or not at all.

    Args:
        out: the folder.
        facts: the new model's.
        live: parts in memory.
        source: a model in folders, from which the other parts are copied.
        extras: further files, name -> text.

    Raises:
        ModelError: a part is neither in memory nor on disk.
        NotFiniteError: a weight in memory is not finite.
        RunError: `out` exists.
    """
    name = "the new model" if source is None else source.name
    parts = live.by_name()
    parts.setdefault("scheduler", FlowMatchEulerDiscreteScheduler() if source is None else source.scheduler)
    with staged_dir(Path(out)) as staging, quiet():
        for part, module in parts.items():  # again: it was merged, or trained
            if isinstance(module, torch.nn.Module):
                check_weights(module.state_dict(), f"{name}, {part}")
        for part in PARTS:
            if part == "transformer" and part in parts and int8_layers(parts[part]):
                write_int8(staging / part, json.loads(parts[part].to_json_string()), parts[part].state_dict().items())
            elif part in parts:
                parts[part].save_pretrained(staging / part)
            elif source is not None and (stored := part_folder(source._with_weights(part), part)).is_dir():
                copy_part(stored, staging / part)
            else:
                raise ModelError(f"has no {part} to save", where=name, hint="pass all its parts")
        index = {**_INDEX, "_diffusers_version": diffusers.__version__}
        atomic_write_json(staging / "model_index.json", index)
        write_facts(staging, dataclasses.replace(facts, parts_from=None))
        for file, content in (extras or {}).items():
            (staging / file).write_text(content, encoding="utf-8")
        if "transformer" in parts and int8_layers(parts["transformer"]):
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


def _device(device: Device) -> Device:
    return pick_device() if device == "auto" else device
