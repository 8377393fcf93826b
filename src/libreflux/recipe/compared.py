"""What differs between two resolved recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two resolved recipes, in the order of ``old``, then of ``new``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    absent = object()
    return [key for key in {**before, **after} if before.get(key, absent) != after.get(key, absent)]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None or not tree:
        yield prefix, tree
        return
    for name, value in items:
        yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
