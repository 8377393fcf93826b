"""How many bytes of tensors are alive at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """`most`: the most bytes, at any time, of the counted tensors that an operation gave or took, views left out."""

    def __init__(self, counted: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.counted = counted
        self.alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, found)):
            if isinstance(tensor, torch.Tensor) and tensor._base is None and self.counted(tensor):
                self.alive[id(tensor)] = weakref.ref(tensor), tensor.nbytes
        self.alive = {key: one for key, one in self.alive.items() if one[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return found
