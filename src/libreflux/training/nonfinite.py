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


HEADS = "heads of the adversary"
"""In the place of pictures, where the gradient of an adversary's heads alone is not finite."""
_RATE = "a lower optimizer.learning_rate"
_HEADS_RATE = "a lower distil.adversarial.learning_rate or a higher distil.adversarial.penalty"


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
    return bad if bad or _usable(norm, clip) else list(sample_ids)


def heads_at_fault(sample_ids: Sequence[str], losses: Sequence[float], norm: float) -> list[str]:
    """`at_fault` of an adversary's heads by their own losses and gradient: pictures, or `HEADS`, or none."""
    return at_fault(sample_ids, losses, 0.0, None) or ([] if _usable(norm, None) else [HEADS])


def _usable(norm: float, clip: float | None) -> bool:
    return math.isfinite(norm) and (norm if clip is None else min(norm, clip)) < LARGEST_NORM


def require_finite(parameters: Iterable[nn.Parameter], step: int, run: Path, *, heads: bool = False) -> None:
    """Raises RunError if the update of `step` left a weight that is not finite: too late to skip it.

    Args:
        parameters: of the adapter, or of an adversary's heads.
        step: that moved them.
        run: the run folder.
        heads: whether they are of heads, for which other keys of the recipe are at fault.
    """
    largest = torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters], float("inf"))
    if not math.isfinite(float(largest)):
        hint = OptionHint(f"go on from the last checkpoint with {_HEADS_RATE if heads else _RATE} and `fork`")
        whose = f" of the {HEADS}" if heads else ""
        told = f"step {step} made weights{whose} that are not finite; nothing of it is saved"
        raise RunError(told, where=run, hint=hint)


def watch(info: StepInfo, skips: Skips, limit: int, run: Path, *, tell: bool) -> None:
    """Warns of a skipped step, if `tell`, and ends the run at too many; call it before the step could be saved.

    Raises:
        RunError: it is the `limit`-th in a row.
    """
    if not info.at_fault:
        return
    heads = list(info.at_fault) == [HEADS]
    blamed = f"the {HEADS}" if heads else f"pictures {', '.join(info.at_fault)}"
    if tell:
        log.warning("step %d is skipped: its loss or gradient is not finite; %s", info.step, blamed)
    if skips.in_a_row >= limit:
        good = info.step - skips.in_a_row - 1  # the step after it was taken, and led to the weights of the skipped ones
        way_back = _way_back(run, good, _HEADS_RATE if heads else _RATE)
        first = "raise distil.adversarial.penalty" if heads else "look at these pictures"
        raise RunError(
            f"{counted(skips.in_a_row, 'step')} in a row up to step {info.step} "
            "had a loss or gradient that is not finite, "
            f"the last one with {blamed}",
            where=run,
            hint=OptionHint(f"{first}, raise max_skipped, or, if the weights are spoilt, {way_back}"),
        )


def _way_back(run: Path, good: int, rate: str) -> str:
    kept = [one.path for one in checkpoint.listed(run) if one.step <= good]
    if not kept:
        return f"start again in another `out` with {rate}: no checkpoint before them is kept"
    later = f"remove the folders after {kept[-1].name} in {kept[-1].parent}"
    return f"{later} and go on with {rate} and `fork`"
