"""adapter + model -> model: W' = round(W + sum_i weight_i * delta_i), summed in fp32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from libreflux.adapter.adapter import Adapter
from libreflux.adapter.io import AdapterFile
from libreflux.adapter.layers import delta_from_tensors, delta_weight, dense_weight, features, linears
from libreflux.adapter.reading import check_strength
from libreflux.adapter.rounding import Rounding, rounding
from libreflux.errors import AdapterError
from libreflux.model.finite import NotFiniteError, is_finite
from libreflux.model.int8 import becomes_int8, dequantise, quantise_weight
from libreflux.model.weight_reader import WeightReader

Source = Adapter | AdapterFile | Mapping[str, Tensor]
_Parts = list[tuple[Mapping[str, Tensor], float, str]]
"""Of one layer: an adapter's tensors for it, the weight, and what an error calls them."""


def _file(source: Source) -> AdapterFile:
    if isinstance(source, AdapterFile):
        return source
    return AdapterFile("adapter", dict(source.state_dict() if isinstance(source, Adapter) else source), {})


def _parts(layers: Mapping[str, tuple[int, int]], adapters: Iterable[tuple[Source, float]]) -> dict[str, _Parts]:
    """Layer -> what is added to it, all of it checked.

    Args:
        layers: name -> in_features and out_features.
        adapters: see `merge_many`.
    """
    parts: dict[str, _Parts] = {}
    for source, weight in adapters:
        file = _file(source)
        for name, own in file.by_layer(layers).items():
            parts.setdefault(name, []).append((own, float(weight), f"{file.where}, {name}"))
    if not parts:
        raise AdapterError("no adapter to merge", hint="name at least one adapter file")
    for name, rows in parts.items():
        for tensors, weight, where in rows:
            check_strength(delta_from_tensors(tensors, *layers[name], where), weight, where)
    return {name: parts[name] for name in layers if name in parts}


@torch.no_grad()  # here, and not around the generator below: it would hold each tensor until the next one is made
def _sum(weight_matrix: Tensor, rows: _Parts) -> Tensor:
    """W + sum_i weight_i * delta_i, in fp32 or what is wider."""
    total = weight_matrix.to(torch.promote_types(weight_matrix.dtype, torch.float32), copy=True)
    size = (total.shape[1], total.shape[0])
    for tensors, weight, where in rows:
        delta = delta_from_tensors(tensors, *size, where, dtype=total.dtype)
        total += weight * delta_weight(delta).to(device=total.device)
    return total


def _check_finite(rounded: Tensor, name: str, rows: _Parts) -> None:
    if not is_finite(rounded):
        files = ", ".join(dict.fromkeys(where.rpartition(", ")[0] for _, _, where in rows))
        hint = "use smaller weights of the adapters, or a model whose own weights are finite"
        raise NotFiniteError("the sum is not finite", where=f"{files}, {name}", hint=hint)


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
    parts = _parts({name: features(linear) for name, linear in found.items()}, adapters)
    for name in parts:  # every refusal before the first change
        dense_weight(found[name], name)
    for name, rows in parts.items():
        weight_matrix = dense_weight(found[name], name)
        rounded = _sum(weight_matrix, rows).to(weight_matrix.dtype)
        _check_finite(rounded, name, rows)
        weight_matrix.copy_(rounded)
    return list(parts)


def merge(transformer: nn.Module, adapter: Source, weight: float = 1.0) -> list[str]:
    """`merge_many` for one adapter."""
    return merge_many(transformer, [(adapter, weight)])


class MergedTensors:
    """A model's tensors with adapters added to them, made one at a time: for `streamed.StreamedTransformer`.

    Memory holds the adapters, and of one layer the weight and some more of its size.

    Args:
        before: the model's.
        adapters: (adapter file, detached adapter or its LyCORIS tensors, weight) pairs.
        dtype: of what is dense.
        int8: whether the linears of the blocks are int8. One that the model has in int8, and no adapter changes, keeps
            its bytes.
        on_tensor: told how many of how many tensors are made.

    Attributes:
        changed: names of the layers that differ from the model's, in its order.
        roundings: of the layers that were made, in their order.

    Raises:
        AdapterError: a tensor fits no layer, or an adapter changes one beyond all numbers.
    """

    def __init__(
        self,
        before: WeightReader,
        adapters: Sequence[tuple[Source, float]],
        *,
        dtype: torch.dtype,
        int8: bool = False,
        on_tensor: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.before, self.dtype, self.int8 = before, dtype, int8
        shapes = {name: before.shapes[f"{name}.weight"] for name in before.linears}
        self._parts = _parts({name: (shape[1], shape[0]) for name, shape in shapes.items()}, adapters)
        self._on_tensor, self._done = on_tensor, 0
        self.changed = tuple(self._parts)
        self.roundings: list[Rounding] = []

    def __call__(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs; see `streamed.Tensors`.

        Raises:
            ModelError: the model's files are damaged.
            NotFiniteError: a sum overflows, or a weight is NaN or infinite.
        """
        for name in names:
            layer, _, attribute = name.rpartition(".")
            own = layer if attribute == "weight" else ""
            in_int8 = self.int8 and own in self.before.linears and becomes_int8(own)
            yield from self._made(name, own, in_int8)
            self._done += 1
            self._on_tensor(self._done, len(self.before.shapes))

    def _made(self, name: str, layer: str, in_int8: bool) -> Iterator[tuple[str, Tensor]]:
        rows = self._parts.get(layer)
        if rows is None and in_int8 and (stored := self.before.int8(name)) is not None:
            yield name, stored[0].clone()  # out of the mapped file
            yield f"{layer}.scale", stored[1].clone()
            return
        weight = self.before.read(name)
        total = weight if rows is None else _sum(weight, rows)
        if rows is not None:
            _check_finite(total, layer, rows)
        if in_int8:
            q, scale = quantise_weight(total, name)
            if rows is not None:
                self._measure(layer, weight, total, dequantise(q, scale, torch.float32))
            yield name, q
            yield f"{layer}.scale", scale
            return
        dense = total.to(self.dtype, copy=rows is None)
        if rows is not None:
            _check_finite(dense, layer, rows)
            self._measure(layer, weight, total, dense.float())
        yield name, dense

    def _measure(self, layer: str, before: Tensor, total: Tensor, stored: Tensor) -> None:
        int8 = becomes_int8(layer) and not self.int8
        self.roundings.append(rounding(layer, before, total, stored, int8=int8))
