"""The names that other programs give to an adapter's tensors, read into LyCORIS' names of diffusers' layers.

A name is a spelling of a layer, a dot, and what it is of that layer. Layers are diffusers' or BFL's; BFL's may hold
several of diffusers' ones, see `model.keys`, whose parts of the adapter are then cut out of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from libreflux.adapter import peft
from libreflux.adapter.layers import LORA_SUFFIXES, LoKr, delta_from_tensors, delta_weight
from libreflux.errors import AdapterError
from libreflux.model.keys import Row, layer_rows, swap_halves

LYCORIS = "lycoris_"
_DOTTED = (
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "transformer.base_model.model.",
    "",
)
_FLAT = ("lora_unet_", "lora_transformer_", LYCORIS)
_SUFFIXES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    **{name: name for name in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    **{name: name for name in ("lora_mid.weight", "scalar", "lora_magnitude_vector")},
}
_ADAPTER = re.compile(r"\.lora_([AB])\.(?!weight$)\w+\.weight$")
"""A LoRA's tensor with the name of PEFT's adapter in it, such as default or default_0."""


def lycoris_name(layer: str) -> str:
    """LyCORIS' prefix of a layer's tensors."""
    return LYCORIS + layer.replace(".", "_")


def read_names(
    tensors: Mapping[str, Tensor], config: peft.Config | None, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter of FLUX in any known spelling, in LyCORIS' names of diffusers' layers.

    Args:
        tensors: see `reading.prepared`.
        config: PEFT's, see `peft.config_of`; None where the file has none.
        where: the file, for errors.

    Returns:
        LyCORIS name -> tensor, and the key map: LyCORIS prefix -> layer name.

    Raises:
        AdapterError: a name is no spelling of a FLUX layer, two are the same tensor's, fused tensors do not fit their
            layer, or PEFT's own names without its configuration.
    """
    known = _spellings(tensors)
    grouped: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        prefix, suffix = _parted(name)
        if suffix is None or prefix not in known:
            strange.append(name)
        elif suffix in grouped.get(prefix, {}):
            hint = "save one adapter in one file"
            raise AdapterError(f"two tensors are {suffix} of {prefix}", where=where, hint=hint)
        else:
            grouped.setdefault(prefix, {})[suffix] = tensor
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        hint = "use a LoRA or LoKr of a FLUX.1 transformer: LyCORIS', diffusers', PEFT's or kohya's"
        raise AdapterError(f"tensors that fit no layer of FLUX: {min(strange)}{more}", where=where, hint=hint)
    found: dict[str, Tensor] = {}
    key_map: dict[str, str] = {}
    for prefix, own in grouped.items():
        row = known[prefix]
        if "alpha" not in own:
            own |= _told_alpha(config, prefix, row, own, where)
        for layer, parts in split_layer(row, own, f"{where}, {prefix}").items():
            if lycoris_name(layer) in key_map:
                raise AdapterError(f"two spellings of {layer}", where=where, hint="use one file per adapter")
            key_map[lycoris_name(layer)] = layer
            found |= {f"{lycoris_name(layer)}.{suffix}": tensor for suffix, tensor in parts.items()}
    return found, key_map


def split_layer(row: Row, tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """Diffusers' layers of one BFL layer's adapter: layer name -> suffix -> tensor.

    LoRA is cut exactly. A LoKr is where the cuts fall between w2's copies; else the piece becomes a full matrix
    (w1 = 1), exact too, but large.

    Raises:
        AdapterError: it has not the rows of its parts.
    """
    if len(row.parts) == 1 and not row.swapped:
        return {row.parts[0]: dict(tensors)}
    if "lora_down.weight" in tensors and "lora_up.weight" in tensors:
        return _split_lora(row, tensors, where)
    return _split_lokr(row, tensors, where)


def _parted(name: str) -> tuple[str, str | None]:
    name = _ADAPTER.sub(r".lora_\1.weight", name)
    for suffix, ours in _SUFFIXES.items():
        if name.endswith(f".{suffix}"):
            return name[: -len(suffix) - 1], ours
    return name, None


def _spellings(names: Iterable[str]) -> dict[str, Row]:
    """Spelling -> row, for as many blocks as the names count; diffusers' layers are rows of themselves."""
    numbers = [int(number) for name in names for number in re.findall(r"blocks[._](\d{1,3})[._]", name)]
    count = max(numbers, default=0) + 1
    rows = layer_rows(count, count, guidance=True)
    every = [*rows, *(Row(part, (part,)) for row in rows for part in row.parts)]
    dotted = {f"{prefix}{row.bfl}": row for prefix in _DOTTED for row in every}
    return dotted | {f"{prefix}{row.bfl.replace('.', '_')}": row for prefix in _FLAT for row in every}


def _told_alpha(
    config: peft.Config | None, prefix: str, row: Row, own: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """alpha of a layer that has no tensor of that name; none where diffusers' rule holds: a scale of 1."""
    if config is None:
        if prefix.startswith(peft.PREFIX):
            hint = f"keep PEFT's {peft.CONFIG} beside it, as {peft.FILES[0]}"
            raise AdapterError("PEFT's file without its configuration: its scale is not known", where=where, hint=hint)
        return {}
    if "lora_down.weight" not in own:
        return {}
    alpha = peft.alpha_of(config, row.bfl, own["lora_down.weight"].shape[0], where)
    return {} if alpha is None else {"alpha": torch.tensor(alpha)}


def _heights(row: Row, in_features: int, out_features: int, where: str) -> list[int]:
    """Rows of each part: q, k and v are square, the rest is the last one's."""
    count = len(row.parts)
    if count == 1:
        return [out_features]
    last = out_features - (count - 1) * in_features
    if last <= 0 or (count == 3 and last != in_features):
        hint = "use an adapter of a FLUX.1 transformer"
        raise AdapterError(f"{out_features} rows are not those of {', '.join(row.parts)}", where=where, hint=hint)
    return [in_features] * (count - 1) + [last]


def _split_lora(row: Row, tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    down, up = (tensors[suffix] for suffix in LORA_SUFFIXES)
    others = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in (*LORA_SUFFIXES, "alpha")}
    if down.ndim != 2 or up.ndim != 2 or others:
        what = f"{', '.join(others)} not supported yet" if others else "a LoRA that is not two matrices"
        raise AdapterError(what, where=where, hint="use plain LoKr or LoRA files")
    pieces = row.split(up, _heights(row, down.shape[1], up.shape[0], where))
    used = [piece.ne(0).any(dim=0) for piece in pieces]
    # Adapters that were trained apart and then fused lie on the diagonal: each part uses ranks of its own.
    apart = len(pieces) > 1 and bool(torch.stack(used).sum(dim=0).max() == 1)
    found = {}
    for part, piece, ranks in zip(row.parts, pieces, used, strict=True):
        kept = ranks if apart else torch.ones_like(ranks)
        if not kept.any():
            continue
        own = {"lora_down.weight": down[kept].contiguous(), "lora_up.weight": piece[:, kept].contiguous()}
        if "alpha" in tensors:
            own["alpha"] = tensors["alpha"] * (int(kept.sum()) / len(kept))
        found[part] = own
    return found


def _split_lokr(row: Row, tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    w1, w2 = (_shape_of(tensors, side, where) for side in ("lokr_w1", "lokr_w2"))
    rows, columns = w1[0] * w2[0], w1[1] * w2[1]
    delta = delta_from_tensors(tensors, columns, rows, where)
    assert isinstance(delta, LoKr)
    if row.swapped:
        return {row.parts[0]: _tensors(swap_lokr(delta) or _dense(swap_halves(delta_weight(delta))))}
    found, start = {}, 0
    for part, height in zip(row.parts, _heights(row, columns, rows, where), strict=True):
        inner = delta.lokr_w2.shape[0]
        if start % inner == 0 and height % inner == 0:
            first = start // inner
            piece = _lokr(delta.lokr_w1[first : first + height // inner], delta.lokr_w2)
        else:
            piece = _dense(delta_weight(delta)[start : start + height].to(delta.lokr_w2.dtype))
        found[part] = _tensors(piece)
        start += height
    return found


def swap_lokr(delta: LoKr) -> LoKr | None:
    """The LoKr whose rows are those of `delta` with their halves exchanged; None where that is no LoKr."""
    if delta.lokr_w1.shape[0] % 2 == 0:
        return _lokr(swap_halves(delta.lokr_w1), delta.lokr_w2)
    if delta.lokr_w1.shape[0] == 1 and delta.lokr_w2.shape[0] % 2 == 0:
        return _lokr(delta.lokr_w1, swap_halves(delta.lokr_w2))
    return None


def _lokr(w1: Tensor, w2: Tensor) -> LoKr:
    made = LoKr(1, 1, 1)
    made.lokr_w1, made.lokr_w2 = (torch.nn.Parameter(one.detach().clone(), requires_grad=False) for one in (w1, w2))
    return made


def _dense(matrix: Tensor) -> LoKr:
    return _lokr(torch.ones(1, 1, dtype=matrix.dtype), matrix)


def _tensors(delta: LoKr) -> dict[str, Tensor]:
    return delta.tensors()


def _shape_of(tensors: Mapping[str, Tensor], side: str, where: str) -> Sequence[int]:
    if side in tensors and tensors[side].ndim == 2:
        return tensors[side].shape
    a, b = tensors.get(f"{side}_a"), tensors.get(f"{side}_b")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        raise AdapterError(f"needs {side}; has {', '.join(sorted(tensors))}", where=where, hint="use plain LoKr files")
    return a.shape[0], b.shape[1]
