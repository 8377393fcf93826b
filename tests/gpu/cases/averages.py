"""Averages of weights on the card: copied beside its work, or at once."""

from __future__ import annotations

import torch

from gpu.alone import DEVICE
from libreflux.training.ema import Averages


def overlapped_is_direct() -> bool:
    """Whether both ways give the same bits, though the weights change as soon as they may."""
    found = []
    for lane in ("own", None):
        weights = {
            "a": torch.ones(1 << 24, dtype=torch.bfloat16, device=DEVICE),
            "b": torch.ones(9, device=DEVICE),
        }
        averages = Averages(weights, [0.1], 1, lane)
        for step in range(1, 6):
            averages.before_change()
            for tensor in weights.values():
                tensor.mul_(1.5)
            averages.update(step)
        averages.before_change()
        for tensor in weights.values():
            tensor.zero_()
        found.append({key: tensor.clone() for key, tensor in averages.tensors().items()})
    return all(tensor.equal(found[1][key]) for key, tensor in found[0].items())
