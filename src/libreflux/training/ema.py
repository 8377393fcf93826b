"""Averages of the trained parameters with power-function profiles, kept in fp32 on the CPU.

Karras et al. 2024 (arXiv 2312.02696), section 3.1 and appendix C. At step t the average weighs the parameters of step
tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1): its length grows with the run, and its start is forgotten. An
average is named by its relative width sigma_rel, the standard deviation of p over t.

In bf16 an average stands still: from 1 to 1.1 with weight 1e-3, 20,000 steps do not move it off 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from libreflux import files
from libreflux.errors import RunError
from libreflux.model.stream import save_live
from libreflux.printing import counted, get_logger
from libreflux.training.checkpoint import step_folders, step_name
from libreflux.training.host_copies import Lane, Overlapped, lane_for

log = get_logger(__name__)

FOLDER = "averages"
STEP = "averages_step"
"""Metadata key: the step that a file's averages are of. Only where that is not the step of its folder."""


def relative_width(gamma: float) -> float:
    """sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), gamma >= 0: the profile's standard deviation / t."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def exponent(width: float) -> float:
    """gamma of a relative width in (0, 0.28]: the largest root of g^3 + 7 g^2 + (16 - s) g + (12 - s), s = width^-2."""
    s = width**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def decay(step: int, gamma: float, since: int = 1) -> float:
    """beta(t) = (1 - k/t)^(gamma + 1) (section 3.1): what is taken in weighs the integral of p over the last k steps.

    Args:
        step: t, from 1.
        gamma: of the profile.
        since: k, steps since the average was last updated, in [1, t].
    """
    return (1 - since / step) ** (gamma + 1)


def profile_products(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> np.ndarray:
    """Inner products of profiles, integral of p_a p_b (appendix C): [A, B] fp64 from (step, gamma) pairs."""
    (ta, ga), (tb, gb) = (np.array(rows, dtype=np.float64).reshape(-1, 2).T for rows in (a, b))
    ta, ga, tb, gb = ta[:, None], ga[:, None], tb[None], gb[None]
    shared = np.where(ta < tb, (ta / tb) ** gb, (tb / ta) ** ga)
    return np.asarray((ga + 1) * (gb + 1) / (ga + gb + 1) * shared / np.maximum(ta, tb))


def hindsight_weights(stored: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[np.ndarray, float]:
    """How to add stored averages so that their profiles come closest to a wanted one, in the least squares.

    Args:
        stored: (step, gamma) of each, at least one.
        wanted: (step, gamma).

    Returns:
        Weights [len(stored)] fp64 whose sum is 1, and the relative L2 error of the profile that they form.
    """
    gram, right = profile_products(stored, stored), profile_products(stored, [wanted])[:, 0]
    weights = np.linalg.lstsq(gram, right, rcond=1e-13)[0]
    weights /= weights.sum()
    own = profile_products([wanted], [wanted])[0, 0]
    return weights, math.sqrt(max(0.0, (own - 2 * weights @ right + weights @ gram @ weights) / own))


class Averages:
    """Averages of some tensors, one per width.

    Args:
        tracked: name -> tensor; the tensors are read at each update, wherever they live.
        widths: sigma_rel of each average, in (0, 0.28].
        every: steps between two updates.
        lane: how tensors are copied beside their device's work, see `training.overlapped`; None: at once. By default it
            is the tensors' own: none for those on the CPU.

    Attributes:
        step: that the averages are of: the last one that was taken in; 0 before any.
    """

    def __init__(
        self,
        tracked: Mapping[str, Tensor],
        widths: Sequence[float],
        every: int = 1,
        lane: Lane | Literal["own"] | None = "own",
    ) -> None:
        self.tracked = dict(tracked)
        self.widths = {width: exponent(width) for width in widths}
        self.every, self.step = every, 0
        self._averages = {
            width: {name: torch.zeros(tensor.shape, dtype=torch.float32) for name, tensor in self.tracked.items()}
            for width in self.widths
        }
        lane = lane_for(self.tracked.values()) if lane == "own" else lane
        self._overlapped = Overlapped(self.tracked, lane) if lane is not None and self.widths else None

    def update(self, step: int) -> None:
        """Take in the parameters of finished step `step`, from 1, if it is one of every so many.

        Call it once for each step, and `before_change` before the next change of the parameters.
        """
        if not self.widths or step % self.every:
            return
        kept = {width: decay(step, gamma, step - self.step) for width, gamma in self.widths.items()}
        self.step = step
        if self._overlapped is None:
            self._take_in(self.tracked, kept)
        else:
            self._overlapped.start(functools.partial(self._take_in, kept=kept))

    def before_change(self) -> None:
        """Lets the next change of the parameters wait until `update` has its copy of them."""
        if self._overlapped is not None:
            self._overlapped.before_change()

    @torch.no_grad()
    def _take_in(self, tensors: Mapping[str, Tensor], kept: Mapping[float, float]) -> None:
        for name, tensor in tensors.items():
            current = tensor.detach().to(device="cpu", dtype=torch.float32)
            for width, named in self._averages.items():
                named[name].lerp_(current, 1 - kept[width])

    def tensors(self) -> dict[str, Tensor]:
        """`<width>/<name>` -> fp32 average, sharing storage; of `step`."""
        if self._overlapped is not None:
            self._overlapped.wait()
        return {
            average_key(width, name): tensor
            for width, named in self._averages.items()
            for name, tensor in named.items()
        }

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take back what `tensors` gave, to the bit; other widths and constants among them are left alone.

        Args:
            tensors: by name.
            step: that they are of.

        Raises:
            RunError: a missing name, or another shape or dtype; nothing was changed then.
        """
        own = self.tensors()
        odd = sorted(set(own) - set(tensors))
        odd += [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
        odd += [key for key in own if key in tensors and tensors[key].dtype != torch.float32]
        if odd:
            hint = "ask only for widths that were tracked from the start, with the adapter they were saved with"
            raise RunError(f"averages do not fit: {', '.join(odd[:3])}", hint=hint)
        for key, average in own.items():
            average.copy_(tensors[key])
        self.step = step


def average_key(width: float, name: str) -> str:
    """The name of one tensor's average in a file."""
    return f"{width!r}/{name}"


def snapshot_path(run: Path, step: int) -> Path:
    """RUN/averages/step-00000500 for step 500: a folder with the averages and a manifest."""
    return run / FOLDER / step_name(step)


def snapshots(run: Path) -> dict[int, Path]:
    """Step -> folder of RUN/averages, rising. Files of an earlier layout are named in a warning."""
    old = sorted(path.name for path in (run / FOLDER).glob("step-*.safetensors"))
    if old:
        log.warning(
            "%s: %s of an earlier layout, such as %s, not used", run / FOLDER, counted(len(old), "file"), old[0]
        )
    return step_folders(run / FOLDER)


def rewind(run: Path, step: int) -> None:
    """Deletes the snapshots after `step`, whose steps are trained again."""
    for number, folder in snapshots(run).items():
        if number > step:
            files.remove_folder(folder)


def write_averages(
    averages: Averages, constants: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], step: int
) -> None:
    """Writes the averages with the adapter's constants (`alpha`), from which `hindsight` makes adapter files.

    Args:
        averages: as they are after `step`, the last update perhaps some steps before it.
        constants: name -> tensor.
        path: of the file.
        metadata: further strings for it.
        step: of the folder that the file is in.
    """
    tensors = averages.tensors()
    own = {} if averages.step == step else {STEP: str(averages.step)}
    save_live(path, {**tensors, **constants}, {**metadata, **own})


def step_of(metadata: Mapping[str, str] | None, step: int) -> int:
    """The step that a file's averages are of, by its metadata, in a folder of `step`; 0: before any was taken in."""
    return int((metadata or {}).get(STEP, step))
