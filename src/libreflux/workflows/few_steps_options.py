"""What may be said of a health check of few steps, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.errors import OptionError, RunError
from libreflux.places import file_place, folder_place
from libreflux.values import adapter_argument, check_side
from libreflux.workflows.adapters import result_name
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent

FILE, PAGE = "few-steps.json", "index.html"
RESULTS = Path("out/few-steps")
FOLDERS = ("cache", "drawn", "pictures", "seen", "sections")
PRECISIONS = ("stored", "fp32", "bf16")
FEW = 8
"""A model of more steps than this is no few-step model, unless `steps` says how many are meant."""


@dataclass(frozen=True)
class FewStepsOptions:
    """What is checked, and on what.

    Attributes:
        model: the model that the adapters are put on: a name, a folder or a hub id.
        adapters: adapter files or run folders, each as "PATH" or "PATH:WEIGHT", put on it together. A run folder alone
            gives a curve over all its checkpoints.
        data: folder of captioned pictures that the adapter was to learn.
        prompts: prompts outside of that: a text file with one a line, a .jsonl with captions, or a captioned folder.
        against: the distilled model that all is compared with; None is `model` without adapters. Named, it takes
            adapters of other weights too.
        broken: adapter that was trained directly, on the distilled model, until it lost the few steps: what 0 % kept
            is. None is noise of the adapter's own norm, on its layers.
        out: folder of the result, which is continued; None is out/few-steps/NAME.
        csv: file that gets what was measured of each prompt; None writes none.
        pictures: new pictures, at most.
        count: prompts, at most.
        steps: to draw in; None is the distilled model's own number.
        keep: the share of few-step ability, 0 to 1, below which a training has gone too far.
        judge: file of a judge of subjects and colours; None is the emoji family's own.
        features: folder of a local CLIP, DINO or other vision model, in the judge's place.
        trained_on: runs, caches and folders of pictures that were trained on, beside what the adapter's run tells.
        resolution: side of the pictures in pixels; None is the model's.
        batch: pictures per forward pass; None is 32, or 1 for a model of billions of parameters.
        seed: of noise and intervals.
        dtype: of the weights: "stored", "fp32" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        progress: shows how far it is.
    """

    model: str
    _: KW_ONLY
    adapters: str | Path | Sequence[str | Path] = ()
    data: Path | str | None = None
    prompts: Path | str | None = None
    against: str | None = None
    broken: str | Path | None = None
    out: Path | str | None = None
    csv: Path | str | None = None
    pictures: int = 64
    count: int = 48
    steps: int | None = None
    keep: float = 0.9
    judge: Path | str | None = None
    features: Path | str | None = None
    trained_on: str | Path | Sequence[str | Path] = ()
    resolution: int | None = None
    batch: int | None = None
    seed: int = 0
    dtype: str = "stored"
    device: str = "auto"
    progress: Progress = field(default=silent, repr=False, compare=False)

    @property
    def named(self) -> tuple[str, ...]:
        """The adapters, of one or of several."""
        given = [self.adapters] if isinstance(self.adapters, str | Path) else self.adapters
        return tuple(str(one) for one in given or ())

    @property
    def result(self) -> Path:
        """The folder of the result."""
        if self.out is not None:
            return Path(self.out)
        return RESULTS / result_name(self.model, [Path(adapter_argument(one)[0]) for one in self.named])


def check_options(options: FewStepsOptions) -> None:
    """Refuses what can be refused without a model, and tries the places that are written.

    Raises:
        OptionError: something that is needed is not there, has no effect, or is out of range.
        RunError: a place that cannot be written, or that holds something else.
    """
    _check_given(options)
    for name, least, most in (
        ("pictures", 4, None),
        ("count", 2, None),
        ("seed", 0, None),
        ("batch", 1, None),
        ("steps", 1, 10_000),
        ("resolution", 16, 8192),
    ):
        if (value := getattr(options, name)) is not None:
            check_whole(name, value, least, most)
    check_side(options.resolution, "resolution")
    if isinstance(options.keep, bool) or not 0 < options.keep <= 1:
        raise OptionError(f"cannot be {options.keep!r}", "keep", hint="use a share above 0, up to 1")
    if options.dtype not in PRECISIONS:
        raise OptionError(f"{options.dtype!r} is no precision", "dtype", hint="use stored, fp32 or bf16")
    if options.csv is not None:
        file_place(Path(options.csv))
    try_result(options.result)


def _check_given(options: FewStepsOptions) -> None:
    if not options.named and options.against is None:
        hint = "name an adapter or a run with `adapters`, or the distilled model with `against`"
        raise OptionError("nothing to check", "few_steps", hint=hint)
    if options.data is None:
        hint = "name the folder of captioned pictures that were to be learnt with `data`"
        raise OptionError("needs `data`", "few_steps", hint=hint)
    if options.prompts is None or not str(options.prompts):
        hint = "name a text file of prompts outside of the pictures, one a line, with `prompts`"
        raise OptionError("needs `prompts`", "few_steps", hint=hint)
    if len(options.named) != 1 and options.broken is None:
        hint = "name an adapter that has lost the few steps with `broken`"
        raise OptionError("needs `broken`: noise can take the place of one adapter only", "few_steps", hint=hint)
    if options.features is not None and options.judge is not None:
        raise OptionError("takes the place of `judge`", "features", hint="give one of them")


def try_result(folder: Path) -> None:
    """Raises RunError unless the folder is free, or of such a check, whole or not, and can be written."""
    folder_place(folder, *FOLDERS)
    for name in (FILE, PAGE):
        file_place(folder / name)
    if not folder.is_dir() or (folder / FILE).is_file():
        return
    if any(name not in FOLDERS and not name.startswith(".") for name in os.listdir(folder)):
        raise RunError("holds something else", where=folder, hint="name another folder, or an empty one")
