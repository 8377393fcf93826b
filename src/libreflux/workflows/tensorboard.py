"""Curves and sample sheets for TensorBoard, an extra; RUN/metrics.jsonl has the same numbers without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from libreflux.errors import RunError
from libreflux.training.callbacks import StepInfo

FOLDER = "tensorboard"
SHEET = "samples"


def require_tensorboard() -> None:
    """Raises RunError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        hint = "pip install 'libreflux[tensorboard]', or tensorboard: false"
        raise RunError("TensorBoard is not installed", where="tensorboard: true", hint=hint)


class Board:
    """Writes event files into RUN/tensorboard, each call through at once: a kill costs nothing that was added.

    Args:
        run: the run folder.
        step: steps already finished; what earlier processes wrote of later ones, or at 0 of any, is no longer shown.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._shown = {one for one in _sheets(run / FOLDER) if one <= step} if step else set[int]()
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1 if step else 0)

    def add_step(self, info: StepInfo) -> None:
        """The numbers of one step; a skipped one has no loss and no gradient norm."""
        numbers = {
            "loss": info.loss,
            "regularisation_loss": info.regularisation_loss,
            "gradient_norm": info.gradient_norm,
            "learning_rate": info.learning_rate,
            "skipped": info.skipped,
            **{f"adversary/{name}": value for name, value in (info.adversary or {}).items()},
            **{f"parts/{name}": value for name, value in (info.parts or {}).items()},
            **{f"sigma_mean/rank{rank}": mean for rank, mean in enumerate(info.sigma_means)},
        }
        for name, value in numbers.items():
            if value is not None:
                self._writer.add_scalar(name, value, info.step)
        self._writer.flush()

    def add_sheet(self, step: int, picture: Image.Image) -> None:
        """A sheet of samples, unless it is shown already: a resumed run draws that of its first step again."""
        if step in self._shown:
            return
        self._writer.add_image(SHEET, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()
        self._shown.add(step)

    def close(self) -> None:
        """Writes what is still in memory and ends the event file."""
        self._writer.close()


def _sheets(folder: Path) -> set[int]:
    """The steps whose sheets the event files in a folder hold; an event that a kill cut short is none."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    shown: set[int] = set()
    for file in sorted(folder.glob("events.out.tfevents.*")):  # named by their time
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                shown = {step for step in shown if step < event.step}  # what that process took again
            if any(value.tag == SHEET for value in event.summary.value):
                shown.add(event.step)
    return shown
