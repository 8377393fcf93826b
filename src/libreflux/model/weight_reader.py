"""A transformer's tensors read from disk one by one, dense and by diffusers' names, however they are stored."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model.checksums import tell_unchecked, verified_part
from libreflux.model.finite import check_weights
from libreflux.model.int8 import dequantise
from libreflux.model.int8_files import METHOD, stored_as, tensor_files, weight_files
from libreflux.model.keys import Row
from libreflux.model.load import quiet
from libreflux.model.opening import FilesSource
from libreflux.model.parts import check_part, reading
from libreflux.model.quantised_files import main_dtype
from libreflux.model.ranges import RangedFile
from libreflux.model.single_file import rows_of
from libreflux.model.source import ModelSource
from libreflux.model.tensor_file import TensorFile

_DIFFER = "the weights and config.json differ: copy or download the model again"


class WeightReader(abc.ABC):
    """The tensors of one transformer; see `weight_reader`. Memory holds those that the caller keeps, and no other.

    Attributes:
        where: the folder or file, for errors.
        shapes: diffusers' tensor name -> shape, in the model's order.
        linears: names of its linear layers, in the model's order.
    """

    where: Path
    shapes: dict[str, tuple[int, ...]]
    linears: list[str]

    def __init__(self, where: Path, config: Mapping[str, Any]) -> None:
        self.where = where
        empty = empty_transformer(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        self.linears = [name for name, part in empty.named_modules() if isinstance(part, torch.nn.Linear)]

    def read(self, name: str) -> Tensor:
        """One tensor in fp32, int8 and fp8 widened.

        Raises:
            ModelError: it is missing, damaged or of another shape.
            NotFiniteError: it is NaN or infinite.
        """
        tensor = self._read(name)
        if tuple(tensor.shape) != self.shapes[name]:
            told = f"{name} is {tuple(tensor.shape)} instead of {self.shapes[name]}"
            raise ModelError(told, where=self.where, hint=_DIFFER)
        wide = tensor.to(torch.float32)
        check_weights({name: wide}, self.where)
        return wide

    def int8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A weight and its scales as an int8 folder of ours has them; None where it is stored in another way."""
        return None

    @property
    def is_int8(self) -> bool:
        """Whether it is an int8 folder of ours."""
        return False

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """What its dense tensors are stored in: the dtype that most of their numbers have."""

    @contextlib.contextmanager
    def verified(self) -> Iterator[None]:
        """Compares the files with the model's checksums beside the block that reads them; nothing if it has none."""
        yield

    @abc.abstractmethod
    def _read(self, name: str) -> Tensor:
        """The tensor, dense, in any floating dtype."""

    def _check(self, stored: set[str], wanted: set[str]) -> None:
        for what, names in (("missing keys", wanted - stored), ("unexpected keys", stored - wanted)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ModelError(f"{what}: {min(names)}{more}", where=self.where, hint=_DIFFER)


class _FolderReader(WeightReader):
    """Of a diffusers folder, dense or in our int8."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        stored = stored_as(config, folder / "config.json")
        if stored not in (None, METHOD):
            raise ModelError(f"is quantised by {stored}", where=folder, hint="use its bf16 weights")
        int8 = stored == METHOD
        if int8:
            tell_unchecked(folder.parent)
        check_part(folder, neighbours=int8)
        self._files = tensor_files(folder)
        scales = {name for name in self._files if name.endswith(".scale")} if int8 else set()
        self._check(set(self._files) - scales, set(self.shapes))
        self._scales = {f"{name.removesuffix('.scale')}.weight": name for name in scales}
        self._opened = lru_cache(maxsize=None)(RangedFile)  # each header once

    def _read(self, name: str) -> Tensor:
        tensor = self._stored(name)
        if tensor.is_floating_point() == (name in self._scales):
            told = "has a scale, and is not int8" if name in self._scales else f"is {tensor.dtype} without a scale"
            raise ModelError(f"{name} {told}", where=self.where, hint=_DIFFER)
        if name not in self._scales:
            return tensor
        return dequantise(tensor, self._stored(self._scales[name]), torch.float32)

    def int8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """See `WeightReader.int8`."""
        return (self._stored(name), self._stored(self._scales[name])) if name in self._scales else None

    @property
    def is_int8(self) -> bool:
        """See `WeightReader.is_int8`."""
        return bool(self._scales)

    @property
    def dtype(self) -> torch.dtype:
        """See `WeightReader.dtype`."""
        dense = self._files.keys() - self._scales.keys() - set(self._scales.values())
        return main_dtype(self._opened(self._files[name]).ranges[name] for name in sorted(dense))

    def _stored(self, name: str) -> Tensor:
        with reading(self._files[name]):
            return self._opened(self._files[name]).read(name)

    @contextlib.contextmanager
    def verified(self) -> Iterator[None]:
        """See `WeightReader.verified`."""
        with verified_part(self.where, [file for file in weight_files(self.where) if file.parent != self.where]):
            yield


class _FileReader(WeightReader):
    """Of a single file, with BFL's names or diffusers'."""

    def __init__(self, file: TensorFile, config: Mapping[str, Any]) -> None:
        super().__init__(file.path, config)
        file.check_formats()
        self._file = file
        rows = rows_of(file) or [Row(name, (name,)) for name in self.shapes]
        used = [row for row in rows if row.parts[0] in self.shapes]
        self._check(set(file.shapes), {row.bfl for row in used})
        self._check({part for row in used for part in row.parts}, set(self.shapes))
        self._rows = {part: row for row in used for part in row.parts}

    @property
    def dtype(self) -> torch.dtype:
        """See `WeightReader.dtype`."""
        return self._file.dtype

    def _read(self, name: str) -> Tensor:
        row = self._rows[name]
        whole = self._file.read(row.bfl)
        heights = [self.shapes[part][0] for part in row.parts]
        if whole.ndim == 0 or whole.shape[0] != sum(heights):
            told = f"{row.bfl} has shape {tuple(whole.shape)}, not {sum(heights)} rows"
            raise ModelError(told, where=self.where, hint=_DIFFER)
        return row.split(whole, heights)[row.parts.index(name)]


def weight_reader(source: ModelSource) -> WeightReader:
    """The tensors of a model's transformer, dense or int8, in a folder or a single file.

    Raises:
        ModelError: a damaged part, or one whose weights are stored in a way that is not read.
    """
    if isinstance(source, FilesSource):
        return _FileReader(TensorFile(source.files.transformer, "transformer"), source.config)
    return _FolderReader(source.fetch("transformer") / "transformer", source.config)


def empty_transformer(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """The dense transformer of a configuration, on the meta device."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with quiet(), torch.device("meta"):
        return FluxTransformer2DModel.from_config(plain)
