"""The tensors of one part of a model in a safetensors file, by its own names, dense."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from libreflux.errors import ModelError
from libreflux.model import quantised_files
from libreflux.model.ranges import RangedFile

_WRAPPERS = ("model.", "module.", "transformer.", "_orig_mod.")
"""What may stand before all names of a file: DeepSpeed's, DDP's, diffusers' pipelines', torch.compile's."""
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", ""),
    "text_encoder": ("text_encoders.clip_l.transformer.text_model.", "text_model.", ""),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
}
"""Where a part's names may begin; the last is its own file's."""
_NOT_USED = {
    "text_encoder": ("logit_scale", "text_projection.", "embeddings.position_ids"),
    "text_encoder_2": ("decoder.", "lm_head.", "encoder.embed_tokens.", "spiece_model", "logit_scale"),
}
"""What full CLIP and T5 files hold besides the encoder; ComfyUI gives its T5 files a `logit_scale`."""
_NORM = re.compile(r"(\.(?:query|key)_norm)\.weight$")
"""ComfyUI's name, since February 2026, of what Black Forest Labs calls `.scale`."""


class TensorFile:
    """The tensors of one part in a safetensors file, without the prefix that they have there; fp8 and int8 become bf16.

    Args:
        path: the file.
        part: transformer, text_encoder, text_encoder_2 or vae.

    Attributes:
        metadata: strings.
        prefix: before the part's names, but for what stands before all names of the file; "" where it is its own file.
        shapes: name -> shape, scales left out.

    Raises:
        ModelError: the file is missing or damaged.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        with self._reading():
            self._file = RangedFile(path)
        self.metadata = self._file.metadata
        wrapper = _wrapper(self._file.ranges)
        inner = {name.removeprefix(wrapper): name for name in self._file.ranges}
        self.prefix = next((one for one in _PREFIXES[part] if any(name.startswith(one) for name in inner)), "")
        self._stored = {
            _NORM.sub(r"\1.scale", name[len(self.prefix) :]): full
            for name, full in inner.items()
            if name.startswith(self.prefix)
        }
        left_out = _NOT_USED.get(part, ())
        names = [n for n in self._stored if not n.startswith(left_out) and not n.endswith(quantised_files.REST)]
        self.shapes = {name: self._file.ranges[self._stored[name]].shape for name in sorted(names)}

    @property
    def dtype(self) -> torch.dtype:
        """What its tensors are computed in where nobody says otherwise: the dtype that most of its numbers have."""
        return quantised_files.main_dtype(self._file.ranges[self._stored[name]] for name in self.shapes)

    def check_formats(self) -> None:
        """Raises ModelError, with the format's name, where a tensor is stored in a way that is not read."""
        with self._reading():
            marked = quantised_files.marks(self.metadata, self._stored, self._file.read, self.path)
        ranges = {name: self._file.ranges[full] for name, full in self._stored.items()}
        quantised_files.check_formats(self.shapes, ranges, marked, self.path)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file where it is dense there."""
        full = self._stored[name]
        with self._reading():
            tensor = self._file.read(full)
            if not quantised_files.is_quantised(self._file.ranges[full]):
                return tensor
            scale = quantised_files.scale_name(name, self._stored)
            return quantised_files.widened(tensor, None if scale is None else self._file.read(self._stored[scale]))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            hint = "the file is missing or damaged: copy or download it again"
            raise ModelError(f"cannot be read ({error})", where=self.path, hint=hint) from error


def _wrapper(names: Collection[str]) -> str:
    """What stands before all names, of `_WRAPPERS`, one or several."""
    found, names = "", [name for name in names if name != "scaled_fp8"]  # a mark of the whole file
    while names and (one := next((w for w in _WRAPPERS if all(name.startswith(found + w) for name in names)), "")):
        found += one
    return found
