"""A model of the FLUX family on disk: known at once, loaded part by part."""

from __future__ import annotations

import abc
import contextlib
import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import PreTrainedTokenizerBase

from libreflux.errors import ModelError, RecipeError
from libreflux.files import sha256_file
from libreflux.model.device import pick_device, pick_dtype
from libreflux.model.facts import Facts, tell_facts
from libreflux.model.finite import check_weights
from libreflux.model.fused_attention import fuse_attention
from libreflux.model.int8_files import weight_files
from libreflux.model.load import quiet
from libreflux.model.parts import check_fit
from libreflux.model.single_file import (
    TensorFile,
)
from libreflux.model.text import TextEncoders

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
Device = torch.device | str


class ModelSource(abc.ABC):
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
        return self.hash_with(sha256_file)

    def hash_with(self, sha256: Callable[[Path], str]) -> str:
        """`hash`, each file's by a function that may remember it, see `data.digests`."""
        return weights_hash(self.fetch("transformer"), sha256)

    @property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """diffusers' own, for pipelines other than ours; ours follows `facts.shift`."""
        return FlowMatchEulerDiscreteScheduler()

    @abc.abstractmethod
    def has(self, part: str) -> bool:
        """Whether the model has "vae" or one of `TEXT_PARTS`."""

    @abc.abstractmethod
    def places(self, *parts: str) -> dict[str, Path | TensorFile]:
        """Where "vae" and `TEXT_PARTS` are: their folders or files, with their weights.

        Raises:
            ModelError: there is no such part.
        """

    @property
    @abc.abstractmethod
    def config_file(self) -> Path | None:
        """Where `config` was read; None where it follows from a single file alone."""

    @abc.abstractmethod
    def part_config(self, part: str) -> dict[str, Any]:
        """config.json of the transformer, the VAE or a text encoder.

        Raises:
            ModelError: there is no such part.
        """

    def load_transformer(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        quantise: bool | None = None,
        device: Device = "cpu",
        waiting: Sequence[str] = (),
    ) -> FluxTransformer2DModel:
        """The transformer in evaluation mode, without gradients; each tensor goes to the device as it is read.

        Args:
            dtype: of the weights, in an int8 transformer of those that are not int8; torch's or its name ("bfloat16",
                "bf16"); None keeps what is stored, in a single file of several dtypes the one that most numbers have.
                What the libraries keep in fp32 stays so.
            quantise: True: in int8, quantised tensor by tensor if it is stored otherwise; False: dense, scale * q where
                it is stored in int8; None: as stored.
            device: where to; "auto" as in `device.pick_device`.
            waiting: names of blocks that stay in RAM, see `offload.BlockOffload`, which is to bring the rest to the
                device: dense weights are all in RAM then.

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
            prefixes = tuple(f"{name}." for name in waiting)
            transformer = self._read_transformer(chosen, quantise, place, prefixes)
        tell_facts(transformer, self.facts)
        setattr(transformer, _READ_FROM, self)
        fuse_attention(transformer)
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

    @abc.abstractmethod
    def load_t5_tokenizer(self) -> PreTrainedTokenizerBase:
        """T5's tokenizer, without a weight.

        Raises:
            ModelError: there is none.
        """

    def _configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the parts that it has; what is wrong with one is told when its part is loaded."""
        found: dict[str, Mapping[str, Any]] = {}
        for part in ("vae", "text_encoder", "text_encoder_2"):
            with contextlib.suppress(ModelError):
                found[part] = self.part_config(part)
        return found

    @abc.abstractmethod
    def _place(self, part: str) -> Path:
        """What a message names of a part."""

    def fetch(self, *parts: str) -> Path:
        """`path`, once the weights of these parts are on disk."""
        return self.path

    @abc.abstractmethod
    def _read_transformer(
        self, dtype: torch.dtype | None, quantise: bool | None, device: Device, waiting: tuple[str, ...]
    ) -> FluxTransformer2DModel:
        """The transformer; see `load_transformer`."""

    @abc.abstractmethod
    def _read_vae(self, dtype: torch.dtype | None, device: Device) -> AutoencoderKL:
        """The VAE; see `load_vae`."""

    @abc.abstractmethod
    def _read_text(self, dtype: torch.dtype | None, device: Device, by_block: bool) -> TextEncoders:
        """The text encoders; see `load_text`."""


_READ_FROM = "_libreflux_source"


def source_of(transformer: object) -> ModelSource | None:
    """The model that a live transformer was read from by `ModelSource.load_transformer`; None for any other."""
    found = getattr(transformer, _READ_FROM, None)
    return found if isinstance(found, ModelSource) else None


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
    """The device; one that is named must be there, but for those that compute nothing, such as "meta"."""
    if isinstance(device, str) and (device == "auto" or device.startswith(("cuda", "mps"))):
        return pick_device(device)
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        hint = "use auto, cpu, cuda, cuda:N or mps"
        raise RecipeError(f"{device!r} is no device", where="device", hint=hint) from None
    return device
