"""Operations that a piece of work dispatches: about what a card has to launch. Views of memory are left out."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    (
        *("view", "t", "transpose", "unsqueeze", "squeeze", "expand", "split", "slice", "select", "detach"),
        *("as_strided", "_unsafe_view", "permute", "alias", "unbind", "chunk", "split_with_sizes", "_reshape_alias"),
        *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "is_same_size"),
    )
)
"""Operations that move and compute nothing."""


class Operations(TorchDispatchMode):
    """Counts operations by name while it is entered.

    Args:
        enabled: False: nothing is counted and nothing is slowed down.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.enabled = enabled

    def __enter__(self) -> Operations:
        if self.enabled:
            super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return self.seen.total()
