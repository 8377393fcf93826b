"""Opens a model: a folder, a hub id's, or single files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import PreTrainedTokenizerBase

from libreflux import plainjson
from libreflux.errors import ModelError, OptionHint
from libreflux.model.checksums import check_small, tell_unchecked, verified_part
from libreflux.model.facts import Facts, check_guided, find_facts
from libreflux.model.int8 import dequantise_model
from libreflux.model.int8_files import METHOD, load_int8, stored_as
from libreflux.model.load import load_part, load_t5_tokenizer, load_text, one_line, quiet
from libreflux.model.locate import locate, part_folder
from libreflux.model.parts import check_layers, check_part, check_widths, json_object
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
from libreflux.model.source import TEXT_PARTS, Device, ModelSource
from libreflux.model.text import TextEncoders

_MASKED = "FluxTransformer2DModelWithMasking"
"""What the published LibreFLUX weights call their transformer: FLUX's, drawn under text padding `bias`."""


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

    @property
    def config_file(self) -> Path:
        """See `ModelSource.config_file`."""
        return self.path / "transformer" / "config.json"

    def has(self, part: str) -> bool:
        """See `ModelSource.has`."""
        return part_folder(self.path, part).is_dir()

    def part_config(self, part: str) -> dict[str, Any]:
        """See `ModelSource.part_config`."""
        return json_object(part_folder(self.path, part) / "config.json")

    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """See `ModelSource.places`."""
        path = self.fetch(*parts)
        return {part: part_folder(path, part) for part in parts}

    def load_t5_tokenizer(self) -> PreTrainedTokenizerBase:
        """See `ModelSource.load_t5_tokenizer`."""
        return load_t5_tokenizer(part_folder(self.path, "tokenizer_2"))

    def _place(self, part: str) -> Path:
        return self.path / part

    def fetch(self, *parts: str) -> Path:
        return locate(self.name, weights=parts)

    def _read_transformer(
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device, waiting: tuple[str, ...]
    ) -> FluxTransformer2DModel:
        folder = self.fetch("transformer") / "transformer"
        in_int8 = stored_as(self.config, folder / "config.json") == METHOD
        if not in_int8 and not quantise:
            place = "cpu" if waiting else device
            loaded: FluxTransformer2DModel = load_part(FluxTransformer2DModel, folder, dtype, place)
            return loaded
        if in_int8:
            tell_unchecked(folder.parent)
        check_part(folder, neighbours=in_int8)
        with one_line(folder):
            transformer = load_int8(folder, dtype=dtype, device=device, waiting=waiting)
            if quantise is False:
                dequantise_model(transformer, transformer.dtype)
        return transformer

    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        vae: AutoencoderKL = load_part(AutoencoderKL, part_folder(self.fetch("vae"), "vae"), dtype, device)
        return vae

    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        return load_text(self.places(*TEXT_PARTS), dtype, device, by_block=by_block)


class FilesSource(ModelSource):
    """Single files, and their base for the rest.

    Attributes:
        files: the files.

    Args:
        files: see there.
        base: the model that has what no file has; None without.
        facts: see `ModelSource`.
        config: see `ModelSource`.
    """

    def __init__(self, files: SingleFiles, base: ModelSource | None, facts: Facts, config: Mapping[str, Any]) -> None:
        super().__init__(str(files), files.transformer, facts, config)
        self.files, self._base = files, base

    @property
    def config_file(self) -> Path | None:
        """See `ModelSource.config_file`."""
        return None if self._base is None else self._base.config_file

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
        found: TensorFile | Path | None = getattr(self.files, part) if part in TOKENIZERS else self.files.holder(part)
        return found

    def _rest(self, part: str) -> ModelSource:
        if self._base is None:
            hint = OptionHint("name with `base` a model that has it, or with `comfyui` a folder of such files")
            raise ModelError(f"no {part} in this file", where=self.files.transformer, hint=hint)
        return self._base

    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """See `ModelSource.places`; of a base on the hub only what no file has is downloaded."""
        found = {part: self._held(part) for part in parts}
        lacking = [part for part, held in found.items() if held is None]
        folder = self._rest(lacking[0]).fetch(*lacking) if lacking else None
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
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device, waiting: tuple[str, ...]
    ) -> FluxTransformer2DModel:
        given = TensorFile(self.files.transformer, "transformer")
        return load_transformer(
            given, self.config, dtype=dtype, quantise=bool(quantise), device=device, waiting=waiting
        )

    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        vae = self.places("vae")["vae"]
        if isinstance(vae, TensorFile):
            return load_vae(vae, file_config(vae, "vae"), dtype, device)
        loaded: AutoencoderKL = load_part(AutoencoderKL, vae, dtype, device)
        return loaded

    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        return load_text(self.places(*TEXT_PARTS), dtype, device, by_block=by_block)


def open_model(name: str | Path | SingleFiles | ModelSource) -> ModelSource:
    """A handle on a model: located, looked at and told about once. Its parts are loaded when they are asked for.

    Args:
        name: "emoji-base" and its kin, a diffusers folder or a hub id, see `locate`; or single files. A model that is
            open already is returned as it is.

    Raises:
        ModelError: no such model, or one that is no model of the FLUX family.
    """
    if isinstance(name, ModelSource):
        return name
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
    check_guided(facts, guided, path)
    stored_as(config, where)
    return FolderSource(str(name), path, facts, config)


def _open_files(files: SingleFiles) -> ModelSource:
    given = TensorFile(files.transformer, "transformer")
    base = None if files.base is None else open_model(files.base)
    config = transformer_config(given, None if base is None else base.config)
    facts = _file_facts(given, base, bool(config.get("guidance_embeds", False)))
    return FilesSource(files, base, facts, config)


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
