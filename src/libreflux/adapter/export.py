"""Adapter files as other programs name them: LyCORIS, ComfyUI, diffusers, kohya."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from libreflux.adapter.formats import lycoris_name, read_names
from libreflux.adapter.io import SCHEMA, AdapterFile
from libreflux.adapter.layers import LORA_SUFFIXES, LoKr, LoRA, delta_from_tensors, delta_norm
from libreflux.errors import AdapterError, OptionHint
from libreflux.files import atomic_save_safetensors
from libreflux.model.keys import OWN_BLOCKS, Row, layer_rows, swap_halves

_PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
_OF_THE_OLD_TENSORS = (
    "lora_adapter_metadata",
    "ss_network_",
    "sshs_",
    "modelspec.hash_sha256",
)
"""Beginnings of metadata keys that say how the tensors of the file that was read are scaled, or hash them."""


@dataclass(frozen=True)
class Program:
    """How a program names an adapter's tensors.

    Attributes:
        prefix: before a layer's name.
        dotted: layers keep their dots; else underscores.
        bfl: layers are BFL's, q, k and v fused; else diffusers'.
        suffixes: what it calls a LoRA's tensors, where not as LyCORIS does. Such a file has no alpha: not all that read
            these names look for one (ai-toolkit, SimpleTuner, sd-scripts' converter), so alpha / rank is in lora_B.
        lokr: it reads LoKr.
        unread: begins the names of layers that it leaves out without a word.
    """

    prefix: str
    dotted: bool = False
    bfl: bool = False
    suffixes: Mapping[str, str] | None = None
    lokr: bool = True
    unread: tuple[str, ...] = ()


PROGRAMS = {
    "comfyui": Program("transformer.", dotted=True, suffixes=_PEFT),
    "diffusers": Program("transformer.", dotted=True, suffixes=_PEFT, lokr=False),
    "kohya": Program("lora_unet_", bfl=True, lokr=False, unread=("final_layer",)),
    "lycoris": Program("lycoris_"),
}


@dataclass(frozen=True)
class Exported:
    """What became of an adapter.

    Attributes:
        lost: ||delta - exported delta|| / ||delta||, Frobenius, over all layers; 0 where all is exact.
        unread: the program's names of layers that are in the file and that it does not read.
        ranks: of the LoRAs in it, from the lowest.
    """

    lost: float
    unread: tuple[str, ...]
    ranks: tuple[int, ...]


def export_adapter(
    file: AdapterFile,
    program: str,
    path: Path,
    *,
    rank: int | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write an adapter as a program names it, atomically.

    A LoKr becomes the nearest LoRA of a rank where one is given: of kron(w1, w2), singular values are the products of
    theirs, so that its best approximation (Eckart and Young 1936) needs the decompositions of w1 and w2 alone.

    Args:
        file: of a FLUX transformer's adapter.
        program: one of `PROGRAMS`.
        path: ends in .safetensors.
        rank: of the LoRA that every LoKr becomes; None keeps LoKr, and refuses what the program does not read.
        on_layer: called with (done, all) layers.

    Raises:
        AdapterError: a LoKr needs a rank, a rank finds no LoKr, or a layer is none of FLUX's.
    """
    style = PROGRAMS[program]
    stored = _by_layer(file)
    deltas = {layer: delta_from_tensors(own, *_size(own), f"{file.where}, {layer}") for layer, own in stored.items()}
    rows = _rows(deltas) if style.bfl else [Row(layer, (layer,)) for layer in deltas]
    unknown = set(deltas) - {part for row in rows for part in row.parts}
    if unknown:
        raise AdapterError(f"{min(unknown)} is no layer of FLUX", where=file.where, hint="export it for lycoris")
    _check_rank(file.where, deltas, program, rank)
    written: dict[str, Tensor] = {}
    unread, ranks = [], set()
    lost = whole = 0.0
    used = [row for row in rows if any(part in deltas for part in row.parts)]
    for index, row in enumerate(used):
        own: dict[str, LoKr | LoRA] = {part: deltas[part] for part in row.parts if part in deltas}
        whole += sum(delta_norm(delta) ** 2 for delta in own.values())
        for part, delta in own.items():
            if isinstance(delta, LoKr) and rank is not None:
                own[part], error = nearest_lora(delta, rank)
                lost += error**2
        as_it_is = len(row.parts) == 1 and not row.swapped and own[row.parts[0]] is deltas[row.parts[0]]
        tensors = stored[row.parts[0]] if as_it_is else _joined(row, own)
        if LORA_SUFFIXES[0] in tensors:
            ranks.add(tensors[LORA_SUFFIXES[0]].shape[0])
        if row.bfl.startswith(style.unread):
            unread.append(row.bfl)
        written |= _named(row, style, tensors)
        if on_layer is not None:
            on_layer(index + 1, len(used))
    atomic_save_safetensors(written, path, _metadata(file.metadata, deltas))
    return Exported(math.sqrt(lost / whole) if whole else 0.0, tuple(unread), tuple(sorted(ranks)))


def _named(row: Row, style: Program, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as a program calls them, with alpha as it wants it."""
    name = row.bfl if style.dotted else row.bfl.replace(".", "_")
    fold = style.suffixes is not None and LORA_SUFFIXES[0] in tensors
    found = _folded(tensors) if fold else _with_alpha(tensors)
    suffixes = style.suffixes or {}
    return {f"{style.prefix}{name}.{suffixes.get(suffix, suffix)}": tensor for suffix, tensor in found.items()}


def _check_rank(where: str, deltas: Mapping[str, LoKr | LoRA], program: str, rank: int | None) -> None:
    """Raises AdapterError for a LoKr that the program does not read, and for a rank that nothing needs."""
    lokr = [layer for layer, delta in deltas.items() if isinstance(delta, LoKr)]
    if lokr and rank is None and not PROGRAMS[program].lokr:
        hint = OptionHint("add `rank` 64 for the nearest LoRA, or merge the adapter into a model")
        raise AdapterError(f"{program} reads no LoKr", where=f"{where}, {lokr[0]}", hint=hint)
    if rank is not None and not lokr:
        what = "has no LoKr that a rank could make a LoRA of"
        raise AdapterError(what, where=where, hint=OptionHint("leave out `rank`"))


def _metadata(told: Mapping[str, str], layers: Iterable[str]) -> dict[str, str]:
    """The metadata that were read, without those of the old tensors, and our key map."""
    key_map = {lycoris_name(layer): layer for layer in layers}
    kept = {key: value for key, value in told.items() if not key.startswith(_OF_THE_OLD_TENSORS)}
    return {**kept, "schema": SCHEMA, "key_map": json.dumps(key_map, sort_keys=True), "format": "pt"}


def _folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of scale 1: alpha / rank is taken into its upper matrix, in fp32 where the dtype would round it."""
    down, up = (tensors[suffix] for suffix in LORA_SUFFIXES)
    alpha = float(tensors.get("alpha", 0))
    scaled = up.float() * (alpha / down.shape[0] if alpha else 1.0)
    narrow = scaled.to(up.dtype)
    exact = narrow if torch.equal(narrow.float(), scaled) else scaled
    return {LORA_SUFFIXES[0]: down, LORA_SUFFIXES[1]: exact}


def _with_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the alpha that sd-scripts and LyCORIS do not do without: the rank, a scale of 1, where there is none."""
    if float(tensors.get("alpha", 0)):
        return dict(tensors)
    factors = ("lora_down.weight", "lokr_w2_b", "lokr_w1_b")
    rank = next((tensors[suffix].shape[0] for suffix in factors if suffix in tensors), 1)
    return {**tensors, "alpha": torch.tensor(float(rank))}


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


def _joined(row: Row, own: Mapping[str, LoKr | LoRA]) -> dict[str, Tensor]:
    """The tensors of one layer of a program, all LoRA: the parts' own on the diagonal, or those of the one part."""
    loras = {part: delta for part, delta in own.items() if isinstance(delta, LoRA)}
    if len(row.parts) == 1:
        tensors = loras[row.parts[0]].tensors()
        return tensors if not row.swapped else tensors | {"lora_up.weight": swap_halves(tensors["lora_up.weight"])}
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
