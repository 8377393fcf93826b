"""adapter + model -> model: W' = round(W + sum_i weight_i * delta_i), summed in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter
from libreflux.adapter.io import AdapterFile
from libreflux.adapter.layers import delta_from_tensors, delta_weight, dense_weight, features, linears
from libreflux.adapter.reading import check_strength
from libreflux.errors import AdapterError
from libreflux.model.finite import NotFiniteError, is_finite

Source = Adapter | AdapterFile | Mapping[str, Tensor]


def _file(source: Source) -> AdapterFile:
    if isinstance(source, AdapterFile):
        return source
    return AdapterFile("adapter", dict(source.state_dict() if isinstance(source, Adapter) else source), {})


@torch.no_grad()
def merge_many(transformer: nn.Module, adapters: Sequence[tuple[Source, float]]) -> list[str]:
    """Add adapters to a transformer's weights, in place.

    Args:
        transformer: plain floating-point linears, no adapter attached; its other parameters stay as they are.
        adapters: (adapter file, detached adapter or its LyCORIS tensors, weight) pairs.

    Returns:
        Names of the changed layers, in the model's order.

    Raises:
        AdapterError: a tensor fits no layer, an adapter changes one beyond all numbers, or a layer is quantised or
            adapted; nothing was changed then.
        NotFiniteError: a sum overflows, or was NaN before; the layers before it are changed.
    """
    found = linears(transformer)
    parts: dict[str, list[tuple[Mapping[str, Tensor], float, str]]] = {}
    for source, weight in adapters:
        file = _file(source)
        for name, own in file.by_layer(found).items():
            parts.setdefault(name, []).append((own, float(weight), f"{file.where}, {name}"))
    if not parts:
        raise AdapterError("no adapter to merge", hint="name at least one adapter file")
    for name, rows in parts.items():  # every refusal before the first change
        dense_weight(found[name], name)
        for tensors, weight, where in rows:
            check_strength(delta_from_tensors(tensors, *features(found[name]), where), weight, where)
    changed = [name for name in found if name in parts]
    for name in changed:
        weight_matrix = dense_weight(found[name], name)
        total = weight_matrix.to(torch.promote_types(weight_matrix.dtype, torch.float32), copy=True)
        for tensors, weight, where in parts[name]:
            delta = delta_from_tensors(tensors, *features(found[name]), where, dtype=total.dtype)
            total += weight * delta_weight(delta).to(device=total.device)
        rounded = total.to(weight_matrix.dtype)
        if not is_finite(rounded):
            files = ", ".join(dict.fromkeys(where.rpartition(", ")[0] for _, _, where in parts[name]))
            hint = "use smaller weights of the adapters, or a model whose own weights are finite"
            raise NotFiniteError("the sum is not finite", where=f"{files}, {name}", hint=hint)
        weight_matrix.copy_(rounded)
    return changed


def merge(transformer: nn.Module, adapter: Source, weight: float = 1.0) -> list[str]:
    """`merge_many` for one adapter."""
    return merge_many(transformer, [(adapter, weight)])
