"""Averages of the trained parameters with power-function profiles, kept in fp32 on the CPU.

Karras et al. 2024 (arXiv 2312.02696), section 3.1 and appendix C. At step t the average weighs the parameters of step
tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1): its length grows with the run, and its start is forgotten. An
average is named by its relative width sigma_rel, the standard deviation of p over t.

In bf16 an average stands still: from 1 to 1.1 with weight 1e-3, 20,000 steps do not move it off 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from libreflux import files
from libreflux.errors import RunError
from libreflux.printing import get_logger
from libreflux.train.checkpoint import step_folders, step_name

log = get_logger(__name__)

FOLDER = "averages"


def relative_width(gamma: float) -> float:
    """sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), gamma >= 0: the profile's standard deviation / t."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def exponent(width: float) -> float:
    """gamma of a relative width in (0, 0.28]: the largest root of g^3 + 7 g^2 + (16 - s) g + (12 - s), s = width^-2."""
    s = width**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def decay(step: int, gamma: float) -> float:
    """beta(t) = (1 - 1/t)^(gamma + 1) (section 3.1), t from 1: a step's weight becomes the integral of p over it."""
    return (1 - 1 / step) ** (gamma + 1)


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
    """

    def __init__(self, tracked: Mapping[str, Tensor], widths: Sequence[float]) -> None:
        self.tracked = dict(tracked)
        self.widths = {width: exponent(width) for width in widths}
        self._averages = {
            width: {name: torch.zeros(tensor.shape, dtype=torch.float32) for name, tensor in self.tracked.items()}
            for width in self.widths
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters of finished step `step`, from 1; call it once for each step."""
        if not self.widths:
            return
        for name, tensor in self.tracked.items():
            current = tensor.detach().to(device="cpu", dtype=torch.float32)
            for width, gamma in self.widths.items():
                self._averages[width][name].lerp_(current, 1 - decay(step, gamma))

    def tensors(self) -> dict[str, Tensor]:
        """`<width>/<name>` -> fp32 average, sharing storage."""
        return {
            average_key(width, name): tensor
            for width, named in self._averages.items()
            for name, tensor in named.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave, to the bit; other widths and constants among them are left alone.

        Raises:
            RunError: a missing name, or another shape or dtype; nothing was changed then.
        """
        own = self.tensors()
        odd = sorted(set(own) - set(tensors))
        odd += [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
        odd += [key for key in own if key in tensors and tensors[key].dtype != torch.float32]
        if odd:
            mend = "ask only for widths that were tracked from the start, with the adapter they were saved with"
            raise RunError(f"averages do not fit: {', '.join(odd[:3])}", mend=mend)
        for key, average in own.items():
            average.copy_(tensors[key])


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
        log.warning("%s: %d files such as %s are of an earlier layout and not used", run / FOLDER, len(old), old[0])
    return step_folders(run / FOLDER)


def rewind(run: Path, step: int) -> None:
    """Deletes the snapshots after `step`, whose steps are trained again."""
    for number, folder in snapshots(run).items():
        if number > step:
            files.remove_folder(folder)


def write_averages(
    averages: Averages, constants: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes the averages with the adapter's constants (`alpha`), from which `hindsight` makes adapter files."""
    files.atomic_save_safetensors({**averages.tensors(), **constants}, path, metadata)
