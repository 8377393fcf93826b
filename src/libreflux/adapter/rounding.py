"""What rounding leaves of a change: of W + dW, once it is stored in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from libreflux.model.int8 import dequantise, quantise_weight


@dataclass(frozen=True)
class Kept:
    """What is left of a change dW where round(W + dW) takes the place of W; Frobenius norms.

    Attributes:
        share: <round(W + dW) - W, dW> / ||dW||^2: how much of the change is there, 1 for all of it. Where W lies on the
            stored grid, as that of an int8 model does, a change of less than half a step everywhere has 0.
        error: ||round(W + dW) - (W + dW)|| / ||dW||: what rounding adds, relative to the change.
    """

    share: float
    error: float


WHOLE = Kept(1.0, 0.0)


@dataclass(frozen=True)
class Rounding:
    """One merged layer.

    Attributes:
        layer: its name.
        norm: of its weight before, ||W||.
        change: of what was added to it, ||dW||.
        stored: what is left of the change as it is stored.
        int8: what is left of it for an int8 model of what is stored, such as `base: int8` of a recipe makes; that of
            `stored` for a layer that stays dense there.
    """

    layer: str
    norm: float
    change: float
    stored: Kept
    int8: Kept


def kept(before: Tensor, total: Tensor, stored: Tensor) -> Kept:
    """What is left of a change; all fp32 [out, in].

    Args:
        before: W.
        total: W + dW.
        stored: `total` as it is stored.
    """
    change = total - before
    squared = float(change.square().sum(dtype=torch.float64))
    if squared == 0:
        return WHOLE
    error = _norm(stored - total) / math.sqrt(squared)
    return Kept(float((stored - before).mul_(change).sum(dtype=torch.float64)) / squared, error)


def rounding(layer: str, before: Tensor, total: Tensor, stored: Tensor, *, int8: bool) -> Rounding:
    """What is left of a layer's change, as it is stored and in int8.

    Args:
        layer: its name.
        before, total: W and W + dW, fp32 [out, in].
        stored: `total` as it is stored, widened again.
        int8: whether the layer is int8 in an int8 model, and is not int8 as it is stored.
    """
    found = kept(before, total, stored)
    coarse = found
    if int8:
        coarse = kept(before, total, dequantise(*quantise_weight(stored, layer), torch.float32))
    return Rounding(layer, _norm(before), _norm(total - before), found, coarse)


def together(rows: Iterable[tuple[Rounding, Kept]]) -> Kept:
    """What is left of the changes of several layers taken as one.

    Args:
        rows: layers, and what is left of each.
    """
    squares = [(row.change**2, left) for row, left in rows]
    whole = sum(square for square, _ in squares)
    if whole == 0:
        return WHOLE
    share = sum(square * left.share for square, left in squares) / whole
    return Kept(share, math.sqrt(sum(square * left.error**2 for square, left in squares) / whole))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
