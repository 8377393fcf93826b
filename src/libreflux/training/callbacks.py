"""What a run tells of itself while it works; training never imports whoever listens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import FluxTransformer2DModel

from libreflux.adapter.targets import Resolved
from libreflux.data.held_out import HeldOut
from libreflux.data.summary import SourceSummary
from libreflux.model.facts import Facts
from libreflux.model.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run that is about to take its first step, new or resumed.

    Attributes:
        run: the run folder.
        step: steps already finished; 0 for a new run; all of them where a kill came before the last step's samples.
        steps: of the whole run.
        pictures: samples of the data: each picture once in each view.
        held_out: pictures that are never trained on; None if the recipe asks for none.
        epoch_steps: steps of the first epoch that shows a picture.
        source: the base model.
        facts: of the model that is trained: the base's, freed of a distillation's own defaults; with a training adapter
            the base's own.
        sample_facts: what sample pictures are drawn with; None: `facts`.
        resolved: the adapted layers.
        start_norm: ||delta|| / ||W|| over them before the first step; None in a resumed run.
    """

    run: Path
    step: int
    steps: int
    pictures: int
    epoch_steps: int
    source: ModelSource
    facts: Facts
    resolved: Sequence[Resolved]
    start_norm: float | None = None
    held_out: HeldOut | None = None
    sample_facts: Facts | None = None


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One finished optimizer step.

    Attributes:
        step: finished steps, this one included.
        steps: of the whole run.
        epoch: from 0.
        loss: mean over the step's pictures, regularised ones left out; None in a step of those alone or a skipped one.
        gradient_norm: before clipping; None in a step that was skipped.
        learning_rate: that this step used.
        seconds: wall time of the step.
        sample_ids: the step's pictures, in slot order.
        sigmas: the noise level of each.
        losses: the loss of each.
        sigma_means: mean noise level of each rank's pictures; None for a rank without any.
        group_norms: layer group -> gradient norm before clipping, if the recipe asks for `gradient_norms`.
        regularisation_loss: mean over the step's regularised pictures; None without any.
        adversary: of a student that learns from an adversary, means over the step's pictures: `discriminator_loss`,
            `adversarial_loss` and what else `training.adversary.told_means` gives; `heads_gradient_norm`. Else None.
        parts: under `guided_target` or `hold_base`, the parts of `loss` as means over the step's pictures, regularised
            ones left out: `plain_loss`, which is flow matching's own, `guided_loss` against the guided target, and
            `hold_base_loss`, the penalty before its weight, over the pictures it applies to. Else None.
        at_fault: the pictures for which this step was skipped, or `nonfinite.HEADS`, see there; none in any other.
        skipped: steps of the run that were skipped so far, this one included.
    """

    step: int
    steps: int
    epoch: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float
    seconds: float
    sample_ids: Sequence[str]
    sigmas: Sequence[float]
    losses: Sequence[float]
    sigma_means: Sequence[float | None] = ()
    group_norms: dict[str, float] | None = None
    regularisation_loss: float | None = None
    adversary: dict[str, float] | None = None
    parts: dict[str, float] | None = None
    at_fault: Sequence[str] = ()
    skipped: int = 0

    @property
    def pictures_per_second(self) -> float:
        return len(self.sample_ids) / self.seconds if self.seconds > 0 else 0.0


class Callbacks:
    """Override what is wanted; by default nothing is told."""

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        """Pictures and captions are being checked and encoded; the total grows as more is found to do."""

    def on_data(self, found: SourceSummary) -> None:
        """A source of pictures and captions was read, nothing is encoded yet; the folder of `held_out.path` is last."""

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        """Something that may take seconds or minutes is done in the block, before the first step: say so."""
        yield

    def on_notice(self, line: str) -> None:
        """Something that a user should know of, such as a check that was passed."""

    def on_start(self, started: Started) -> None:
        """Everything is loaded and the adapter is attached."""

    def on_step(self, info: StepInfo) -> None:
        """An optimizer step is finished, not yet saved."""

    def on_sample(self, step: int, transformer: FluxTransformer2DModel) -> None:
        """Time for sample pictures after `step` steps; the transformer is the live one, leave it as it is.

        The checkpoint of `step`, if one is due, is already written. A run that is resumed at `step` calls this again,
        at its last step too, until that was whole and RUN/adapter.safetensors was written: leave the same each time.
        """

    def on_measure(self, step: int, transformer: FluxTransformer2DModel, held_out: HeldOut) -> None:
        """Time to measure the held-out pictures after `step` steps, 0 and the last included; else as `on_sample`.

        Under torchrun the other processes wait, however long it takes.
        """

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""
