"""Adapter files as other programs name them: LyCORIS, ComfyUI, diffusers, kohya."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from libreflux.adapter.files import SCHEMA, AdapterFile
from libreflux.adapter.layers import LoKr, LoRA, delta_from_tensors, delta_norm
from libreflux.adapter.spelling import lycoris_name, read_names, swap_lokr
from libreflux.errors import AdapterError
from libreflux.files import atomic_save_safetensors
from libreflux.model.keys import OWN_BLOCKS, Row, layer_rows, swap_halves

_PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Program:
    """How a program names an adapter's tensors.

    Attributes:
        prefix: before a layer's name.
        dotted: layers keep their dots; else underscores.
        bfl: layers are BFL's, q, k and v fused; else diffusers'.
        suffixes: what it calls a LoRA's tensors, where not as LyCORIS does.
        lokr: it reads LoKr.
    """

    prefix: str
    dotted: bool = False
    bfl: bool = False
    suffixes: Mapping[str, str] | None = None
    lokr: bool = True


PROGRAMS = {
    "comfyui": Program("transformer.", dotted=True, suffixes=_PEFT),
    "diffusers": Program("transformer.", dotted=True, suffixes=_PEFT, lokr=False),
    "kohya": Program("lora_unet_", bfl=True),
    "lycoris": Program("lycoris_"),
}


def export_adapter(
    file: AdapterFile,
    program: str,
    path: Path,
    *,
    rank: int | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> float:
    """Write an adapter as a program names it, atomically.

    A LoKr that a program cannot read (diffusers), or not where it fuses layers (kohya's q, k and v), becomes the
    nearest LoRA of a rank: of kron(w1, w2), singular values are the products of theirs, so that its best
    approximation (Eckart and Young 1936) needs the decompositions of w1 and w2 alone.

    Args:
        file: of a FLUX transformer's adapter.
        program: one of `PROGRAMS`.
        path: ends in .safetensors.
        rank: of these LoRAs; None refuses them.
        on_layer: called with (done, all) layers.

    Returns:
        ||delta - exported delta|| / ||delta||, Frobenius, over all layers; 0 where all is exact.

    Raises:
        AdapterError: a LoKr needs a rank, or a layer is none of FLUX's.
    """
    style = PROGRAMS[program]
    stored = _by_layer(file)
    deltas = {layer: delta_from_tensors(own, *_size(own), f"{file.where}, {layer}") for layer, own in stored.items()}
    rows = _rows(deltas) if style.bfl else [Row(layer, (layer,)) for layer in deltas]
    unknown = set(deltas) - {part for row in rows for part in row.parts}
    if unknown:
        raise AdapterError(f"{min(unknown)} is no layer of FLUX", where=file.where, mend="export it for lycoris")
    written: dict[str, Tensor] = {}
    lost = whole = 0.0
    used = [row for row in rows if any(part in deltas for part in row.parts)]
    for index, row in enumerate(used):
        own: dict[str, LoKr | LoRA] = {part: deltas[part] for part in row.parts if part in deltas}
        fits = style.lokr and len(row.parts) == 1
        if not (fits and _swappable(row, own)):
            for part, delta in own.items():
                if isinstance(delta, LoKr):
                    if rank is None:
                        why = "reads no LoKr" if not style.lokr else f"fuses {row.bfl}, and several LoKr are not one"
                        mend = "add --rank 64 for the nearest LoRA, or merge the adapter into a model"
                        raise AdapterError(f"{program} {why}", where=f"{file.where}, {part}", mend=mend)
                    own[part], error = nearest_lora(delta, rank)
                    lost += error**2
        whole += sum(delta_norm(deltas[part]) ** 2 for part in own)
        name = row.bfl if style.dotted else row.bfl.replace(".", "_")
        as_it_is = len(row.parts) == 1 and not row.swapped and own[row.parts[0]] is deltas[row.parts[0]]
        for suffix, tensor in (stored[row.parts[0]] if as_it_is else _joined(row, own)).items():
            written[f"{style.prefix}{name}.{(style.suffixes or {}).get(suffix, suffix)}"] = tensor
        if on_layer is not None:
            on_layer(index + 1, len(used))
    key_map = {lycoris_name(layer): layer for layer in deltas}
    metadata = {**file.metadata, "schema": SCHEMA, "key_map": json.dumps(key_map, sort_keys=True), "format": "pt"}
    atomic_save_safetensors(written, path, metadata)
    return math.sqrt(lost / whole) if whole else 0.0


def nearest_lora(delta: LoKr, rank: int) -> tuple[LoRA, float]:
    """The LoRA of at most this rank that is nearest to a LoKr, and ||their difference|| (Frobenius).

    Args:
        delta: kron(w1 [a, b], w2 [c, d]).
        rank: at least 1; no more are used than the LoKr has.
    """
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(one.detach().float(), full_matrices=False) for one in (delta.lokr_w1, delta.lokr_w2)
    )
    values = torch.outer(s1, s2).flatten()
    real = int((values > values.max() * 1e-7).sum())
    order = values.argsort(descending=True)[: max(1, min(rank, real))]
    first, second = order // len(s2), order % len(s2)
    root = values[order].sqrt()
    up = torch.einsum("ar,cr->acr", u1[:, first], u2[:, second]).flatten(0, 1) * root
    down = torch.einsum("rb,rd->rbd", v1[first], v2[second]).flatten(1) * root[:, None]
    lora = LoRA(down.shape[1], up.shape[0], len(order))
    dtype = delta.lokr_w2.dtype
    lora.lora_down, lora.lora_up = (torch.nn.Parameter(one.to(dtype), requires_grad=False) for one in (down, up))
    rest = values.double().square().sum() - values[order].double().square().sum()
    return lora, math.sqrt(max(0.0, float(rest)))


def _by_layer(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """Layer name -> suffix -> tensor, in the order of the file."""
    tensors, names = file.tensors, file.layer_names()
    if any(name.partition(".")[0] not in names for name in tensors):  # lycoris-lora's own files have no key map
        tensors, names = read_names(tensors, None, file.where)
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, suffix = name.partition(".")
        grouped.setdefault(names[prefix], {})[suffix] = tensor
    return grouped


def _size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    if "lora_down.weight" in tensors and "lora_up.weight" in tensors:
        return tensors["lora_down.weight"].shape[-1], tensors["lora_up.weight"].shape[0]
    sizes = [1, 1]
    for side in ("lokr_w1", "lokr_w2"):
        left, right = tensors.get(side, tensors.get(f"{side}_a")), tensors.get(side, tensors.get(f"{side}_b"))
        sizes[0] *= 1 if right is None else right.shape[-1]
        sizes[1] *= 1 if left is None else left.shape[0]
    return sizes[0], sizes[1]


def _rows(layers: Mapping[str, object]) -> list[Row]:
    numbers = [int(layer.split(".")[1]) for layer in layers if layer.startswith(OWN_BLOCKS)]
    count = max(numbers, default=-1) + 1
    return layer_rows(count, count, guidance=True)


def _swappable(row: Row, own: Mapping[str, LoKr | LoRA]) -> bool:
    deltas = list(own.values())
    return not row.swapped or not isinstance(deltas[0], LoKr) or swap_lokr(deltas[0]) is not None


def _joined(row: Row, own: Mapping[str, LoKr | LoRA]) -> dict[str, Tensor]:
    """The tensors of one layer of a program: of the parts' LoRAs on the diagonal, or of the one part."""
    if len(row.parts) == 1:
        delta = own[row.parts[0]]
        if row.swapped and isinstance(delta, LoKr):
            swapped = swap_lokr(delta)
            assert swapped is not None
            return swapped.tensors()
        tensors = delta.tensors()
        return tensors if not row.swapped else tensors | {"lora_up.weight": swap_halves(tensors["lora_up.weight"])}
    loras = {part: delta for part, delta in own.items() if isinstance(delta, LoRA)}
    height = next(iter(loras.values())).lora_down.shape[1]
    scales = {delta.scale for delta in loras.values()}
    alike = len(scales) == 1
    rank = sum(delta.lora_down.shape[0] for delta in loras.values())
    ups, column = [], 0
    for part in row.parts:
        given = loras.get(part)
        rows = height if given is None else given.lora_up.shape[0]
        if given is None and part == row.parts[-1] and len(row.parts) == 4:
            rows = 4 * height  # FLUX's single blocks: the MLP is four times as wide
        block = torch.zeros(rows, rank, dtype=next(iter(loras.values())).lora_up.dtype)
        if given is not None:
            width = given.lora_up.shape[1]
            block[:, column : column + width] = given.lora_up.detach() * (1.0 if alike else given.scale)
            column += width
        ups.append(block)
    down = torch.cat([delta.lora_down.detach() for delta in loras.values()])
    alpha = scales.pop() * rank if alike else float(rank)
    return {"lora_down.weight": down, "lora_up.weight": torch.cat(ups), "alpha": torch.tensor(alpha)}
