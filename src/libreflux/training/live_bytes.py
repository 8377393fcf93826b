"""Counts what is alive while operations run, and computes the shapes of like operations on the meta device once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
_ITSELF: list[_Shape] = []
"""The result is the first argument, changed in place: on the meta device there is nothing to change."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the context create, while they are alive.

    On the meta device most operations find the shape of their result in Python, which takes most of a pass' time. The
    blocks of a transformer are alike, so an operation that has been seen with the same shapes is not asked again.

    Attributes:
        live: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._seen: dict[Hashable, list[_Shape] | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        for tensor in given:  # what was there before is not ours to count
            self._known.add(tensor.untyped_storage()._cdata)
        out = self._result(func, args, kwargs, given)
        for tensor in _tensors((out,)):
            self._count(tensor)
        return out

    def _result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
        signature = _signature(func, args, kwargs, given)
        if signature is None:
            return func(*args, **kwargs)
        shapes = self._seen.get(signature)
        if shapes is _ITSELF:
            return args[0]
        if shapes:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in shapes]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        if signature not in self._seen:
            self._seen[signature] = _ITSELF if args and out is args[0] else _fresh(out, given)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> Hashable | None:
    """What decides the shapes of a result; None where the operation has to run, such as one on numbers."""
    if not given or not isinstance(func, torch._ops.OpOverload) or torch.Tag.inplace_view in func.tags:
        return None
    if any(one.device.type != "meta" or one.layout != torch.strided or one.is_complex() for one in given):
        return None
    signature = (
        func,
        torch.get_default_dtype(),
        _known_by(args),
        tuple((name, _known_by(value)) for name, value in kwargs.items()),
    )
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _known_by(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_known_by, value))
    return type(value), value  # 1, 1.0 and True are equal


def _fresh(out: Any, given: Sequence[Tensor]) -> list[_Shape] | None:
    """The shapes of results that each fill a storage of their own; None where one is a view, or no tensor."""
    results = list(out) if isinstance(out, tuple) else [out]
    if not results or not all(type(one) is Tensor and one.layout == torch.strided for one in results):
        return None
    if any(one.device.type != "meta" for one in results):
        return None
    storages = {one.untyped_storage()._cdata for one in (*results, *given)}
    if len(storages) < len(results) + len({one.untyped_storage()._cdata for one in given}):
        return None
    made: list[_Shape] = [(one.shape, one.stride(), one.dtype) for one in results]
    for one, (size, stride, dtype) in zip(results, made, strict=True):
        if one.untyped_storage().nbytes() != torch.empty_strided(size, stride, dtype=dtype, device="meta").nbytes:
            return None
    return made
