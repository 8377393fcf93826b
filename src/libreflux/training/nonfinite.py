"""Steps whose loss or gradient is not finite: left out and counted; too many in a row end the run.

A skipped step is a step of the run: the order, the noise levels and the learning rate go on by its number. Weights and
optimizer stay as they were; the averages take the unchanged weights in, so that their time goes on too. All ranks see
the same losses and the same summed gradient, and so skip the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from libreflux.errors import OptionHint, RunError
from libreflux.printing import counted, get_logger
from libreflux.training import checkpoint
from libreflux.training.callbacks import StepInfo

log = get_logger(__name__)

LARGEST_NORM = 2.0**63
"""Of a gradient that is stepped along: the second moment keeps squares, and 2^128 is no fp32 number any more."""


@dataclass
class Skips:
    """How many steps of a run were skipped: part of every checkpoint.

    Attributes:
        total: in the whole run.
        in_a_row: up to the last step, which was not skipped if it is 0.
    """

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """Take in one step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


def at_fault(sample_ids: Sequence[str], losses: Sequence[float], norm: float, clip: float | None) -> list[str]:
    """The pictures for which a step must be skipped, none if it may be taken.

    Args:
        sample_ids: the step's pictures.
        losses: the loss of each.
        norm: of the step's gradient before clipping.
        clip: the norm that it is clipped to; None: it is not.

    Returns:
        Those whose loss is not finite, or, if only the gradient is not usable, all.
    """
    bad = [sample for sample, loss in zip(sample_ids, losses, strict=True) if not math.isfinite(loss)]
    usable = math.isfinite(norm) and (norm if clip is None else min(norm, clip)) < LARGEST_NORM
    return bad if bad or usable else list(sample_ids)


def require_finite(parameters: Iterable[nn.Parameter], step: int, run: Path) -> None:
    """Raises RunError if the update of `step` left a weight that is not finite: too late to skip it."""
    largest = torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters], float("inf"))
    if not math.isfinite(float(largest)):
        hint = OptionHint("go on from the last checkpoint with a lower optimizer.learning_rate and `fork`")
        raise RunError(f"step {step} made weights that are not finite; nothing of it is saved", where=run, hint=hint)


def watch(info: StepInfo, skips: Skips, limit: int, run: Path, *, tell: bool) -> None:
    """Warns of a skipped step, if `tell`, and ends the run at too many; call it before the step could be saved.

    Raises:
        RunError: it is the `limit`-th in a row.
    """
    if not info.at_fault:
        return
    pictures = ", ".join(info.at_fault)
    if tell:
        log.warning("step %d is skipped: its loss or gradient is not finite; pictures %s", info.step, pictures)
    if skips.in_a_row >= limit:
        good = info.step - skips.in_a_row - 1  # the step after it was taken, and led to the weights of the skipped ones
        way_back = _way_back(run, good)
        raise RunError(
            f"{counted(skips.in_a_row, 'step')} in a row up to step {info.step} "
            "had a loss or gradient that is not finite, "
            f"the last one with pictures {pictures}",
            where=run,
            hint=OptionHint(f"look at these pictures, raise max_skipped, or, if the weights are spoilt, {way_back}"),
        )


def _way_back(run: Path, good: int) -> str:
    kept = [one.path for one in checkpoint.listed(run) if one.step <= good]
    if not kept:
        return "start again in another `out` with a lower optimizer.learning_rate: no checkpoint before them is kept"
    later = f"remove the folders after {kept[-1].name} in {kept[-1].parent}"
    return f"{later} and go on with a lower optimizer.learning_rate and `fork`"
