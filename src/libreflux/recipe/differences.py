"""Which keys differ between two resolved recipes, and which decide no trained number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

INDECISIVE = frozenset(
    {
        "out",
        "cache",
        "samples",
        "save",
        "device",
        "gradient_norms",
        "tensorboard",
        "max_quarantined",
        "max_skipped",
        "ema",
        "ema_every",
        "deterministic",
        "threads",
        "gradient_checkpointing",
        "offload_blocks",
        "compile",  # the checkpoint holds what was decided
        "text_precision",  # the cache's settings hold it, and the data's fingerprint those
    }
)


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
