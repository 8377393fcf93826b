"""What a measure is made of: a number or two of each picture or prompt, kept so that others can count anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Over = Literal["pictures", "prompts", "others"]
DIGITS = 9
"""Of what is kept: more than fp32 has."""


@dataclass(frozen=True)
class Units:
    """The N units of a measure, which is Σ above / Σ below, or its root.

    Attributes:
        over: what they are: the first N of the result's held-out pictures or prompts, or others without a name there.
        above: N numbers.
        below: N numbers; None: all are 1.
        root: whether the measure is the root of the ratio.
    """

    over: Over
    above: Sequence[float]
    below: Sequence[float] | None = None
    root: bool = False

    @staticmethod
    def of(over: Over, above: np.ndarray, below: np.ndarray, *, root: bool) -> Units:
        """Of two arrays [N], rounded to `DIGITS`."""
        plain = bool((below == 1).all())
        return Units(over, _rounded(above), None if plain else _rounded(below), root)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(above [N], below [N])."""
        above = np.array(self.above, np.float64)
        return above, np.ones_like(above) if self.below is None else np.array(self.below, np.float64)

    def values(self) -> np.ndarray:
        """[N]: the measure of each unit alone, NaN where nothing is below."""
        above, below = self.arrays()
        found = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
        return np.sqrt(np.maximum(found, 0.0)) if self.root else found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {"over": self.over, "above": _plain(self.above)}
        rows |= {} if self.below is None else {"below": _plain(self.below)}
        return rows | ({"root": True} if self.root else {})

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Units:
        """The inverse of `as_json`.

        Raises:
            ValueError: other units, or columns of several lengths.
        """
        above, below = _numbers(row["above"]), row.get("below")
        below = None if below is None else _numbers(below)
        if row["over"] not in get_args(Over) or (below is not None and len(below) != len(above)):
            raise ValueError("no units of a measure")
        return Units(row["over"], above, below, bool(row.get("root", False)))


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _plain(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
