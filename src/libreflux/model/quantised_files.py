"""Quantised tensors in single files: which layer is stored how, and its dense weight.

What is read: fp8 with and without a scale, int8 with one, a scale being of the whole tensor or of each row. ComfyUI
tells a layer's format in its tensor `<layer>.comfy_quant` (JSON as bytes) or, for all layers, in the file's metadata;
older files tell nothing and have the scales alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from libreflux import plainjson
from libreflux.errors import ModelError
from libreflux.model.ranges import Range

MARK = ".comfy_quant"
"""Of a layer: its format, as JSON in bytes."""
METADATA = "_quantization_metadata"
"""Of a file: the formats of all layers, as JSON."""
SCALES = (".scale_weight", ".weight_scale")
REST = (*SCALES, ".scale_input", ".input_scale", "scaled_fp8", MARK)
"""Endings of what a layer has besides its weight. Scales of x are for arithmetic in fp8, and not needed here."""

_FP8, _INT8 = ("F8_E4M3", "F8_E5M2"), "I8"
_DENSE = ("F64", "F32", "F16", "BF16")
_READ = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e5m2_rowwise")
_READ_INT8 = ("int8_tensorwise", "int8_rowwise")
_IDLE = ("format", "full_precision_matrix_mult", "convrot_groupsize", "orig_dtype", "orig_shape")
"""What a mark may say without another meaning of the weight."""
_LONGEST_MARK = 10_000
_OTHERS = {
    ".absmax": "bitsandbytes",
    ".quant_state": "bitsandbytes",
    ".weight_scale_2": "nvfp4",
    ".weight_codebook": "asym_w4a8_int8",
    ".weight_scale_inv": "fp8 in blocks",
    ".wscales": "SVDQuant",
    ".qweight": "GPTQ, AWQ or SVDQuant",
}
"""Formats that are not read, by what their tensors' names end in or contain."""
_HINT = "use the bf16, fp16 or fp8 file; `libreflux export` in int8 makes it small"


def marks(
    metadata: Mapping[str, str], layers: Mapping[str, str], read: Callable[[str], Tensor], where: object
) -> dict[str, dict[str, Any]]:
    """What a file says of the formats of its layers: layer -> the mark, all under the names of `layers`' keys.

    Args:
        metadata: the file's.
        layers: every tensor's name -> its name in the file, which metadata may use too.
        read: name in the file -> tensor.
        where: the file, for errors.

    Raises:
        ModelError: a mark that cannot be read.
    """
    try:
        told = plainjson.parse(metadata.get(METADATA, "{}")).get("layers", {})
        stored = {layers[name].removesuffix(".weight"): name.removesuffix(".weight") for name in layers}
        found = {stored.get(str(layer), str(layer)): dict(mark) for layer, mark in told.items()}
        for name, full in layers.items():
            if name.endswith(MARK):
                raw = read(full)
                if raw.nbytes > _LONGEST_MARK:
                    raise ValueError(f"{name} has {raw.nbytes} bytes")
                found[name.removesuffix(MARK)] = dict(plainjson.parse(bytes(raw.view(torch.uint8).tolist()).decode()))
        return found
    except (ValueError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        hint = "the file is damaged: copy or download it again"
        raise ModelError(f"cannot read how it is quantised ({error})", where=where, hint=hint) from None


def check_formats(
    names: Iterable[str], ranges: Mapping[str, Range], marked: Mapping[str, Mapping[str, Any]], where: object
) -> None:
    """Raises ModelError, with the format's name, where a tensor is stored in a way that is not read.

    Args:
        names: of the tensors that a model is made of.
        ranges: of all tensors, scales included.
        marked: see `marks`.
        where: the file, for errors.
    """
    for name in ranges:
        for ending, told in _OTHERS.items():
            if name.endswith(ending) or f"{ending}." in name:
                raise _refused(told, where, name)
    for layer, mark in marked.items():
        kind, odd = mark.get("format"), sorted(key for key, value in mark.items() if key not in _IDLE and value)
        if kind not in (*_READ, *_READ_INT8) or odd:
            raise _refused(f"{kind} with {', '.join(odd)}" if odd else str(kind), where, layer)
    for name in names:
        stored, scale = ranges[name], scale_name(name, ranges)
        if scale is not None:
            _check_scale(name, stored, ranges[scale], where)
        if stored.kind in _DENSE or stored.kind in _FP8 or (stored.kind == _INT8 and scale is not None):
            continue
        told = f"{stored.kind} without a scale" if stored.kind == _INT8 else f"a format that stores {stored.kind}"
        raise _refused(told, where, name)


def check_plain(ranges: Mapping[str, Range], where: object) -> None:
    """Raises ModelError where tensors of a folder are quantised: its libraries would take them for the weights.

    Args:
        ranges: of all tensors of a file.
        where: the file, for errors.
    """
    for name, stored in ranges.items():
        if name.endswith(REST):
            raise _refused("scales beside its weights, in a folder", where, name)
        if name.endswith((".weight", ".bias")) and stored.kind not in (*_DENSE, *_FP8):
            raise _refused(f"a format that stores {stored.kind}", where, name)
    check_formats((), ranges, {}, where)


def scale_name(name: str, names: Mapping[str, object]) -> str | None:
    """The name of a weight's scale; None where there is none."""
    layer = name.removesuffix(".weight")
    return next((layer + ending for ending in SCALES if layer + ending in names), None) if layer != name else None


def is_quantised(stored: Range) -> bool:
    """Whether a tensor must be widened, see `widened`."""
    return stored.kind in (*_FP8, _INT8)


def widened(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """scale * tensor in bf16, computed in fp32.

    Args:
        tensor: fp8 or int8 [rows, ...].
        scale: one number, or one for each row; None is 1.
    """
    wide = tensor.float()
    if scale is not None:
        scale = scale.float()
        wide *= scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (wide.ndim - 1))
    return wide.to(torch.bfloat16)


def main_dtype(stored: Iterable[Range]) -> torch.dtype:
    """The dtype that most numbers of some tensors have, bf16 for those that are widened; fp32 without any."""
    counts: dict[torch.dtype, int] = {}
    for one in stored:
        dtype = torch.bfloat16 if is_quantised(one) else one.dtype
        if dtype is not None and dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + max(1, torch.Size(one.shape).numel())
    return max(counts, key=lambda dtype: (counts[dtype], dtype.itemsize), default=torch.float32)


def _check_scale(name: str, stored: Range, scale: Range, where: object) -> None:
    rows = stored.shape[0] if stored.shape else 1
    if scale.kind in ("U8", "F8_E8M0"):
        raise _refused("mxfp8", where, name)
    if scale.kind not in _DENSE:
        raise _refused(f"a format with scales in {scale.kind}", where, name)
    single = torch.Size(scale.shape).numel() == 1
    if not single and (scale.shape[0] != rows or torch.Size(scale.shape).numel() != rows):
        raise _refused(f"blocks ({tuple(scale.shape)} scales for {tuple(stored.shape)})", where, name)
    if not is_quantised(stored):
        raise _refused(f"a format that scales {stored.kind}", where, name)


def _refused(told: str, where: object, name: str) -> ModelError:
    return ModelError(f"is quantised by {told}, which is not read ({name})", where=where, hint=_HINT)
