"""What may be said of a probe, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from libreflux.errors import OptionError
from libreflux.probing.reader import require_reader
from libreflux.values import check_side, listed_numbers, number_list
from libreflux.workflows.progress import Progress, silent

if TYPE_CHECKING:
    from libreflux.probing.settings import Changes
    from libreflux.workflows.probe_own import Measures

PRECISIONS = ("stored", "fp32", "bf16")
MOST_GUIDANCE = MOST_STEPS = 1e4
_RANGES = {"pictures": (2, None), "prompts": (2, None), "resolution": (16, 8192), "batch": (1, None), "seed": (0, None)}


@dataclass(frozen=True)
class ProbeOptions:
    """What is probed, and how finely.

    Attributes:
        model: a name, a folder or a hub id.
        adapters: adapter files or run folders that are put on it, each as "PATH" or "PATH:WEIGHT".
        against: the distilled model that it was freed from, or the folder of its probe; None measures no freedom.
        reference: what a free model is like, a model or the folder of its probe. None is what the distilled model was
            distilled from, or theory.
        controls: with `against`, draw the distilled model at its best guidance below 1 too, so that drawn measures have
            a control without training; False leaves those rows out and saves their time.
        data: folder of captioned pictures that the model was not trained on; None is the emoji family's.
        trained_on: runs, caches and folders of pictures that the model was trained on, beside what the run of an
            adapter tells: each measured picture is looked for in them.
        out: folder of the result, which is continued; None is out/probe/NAME.
        csv: file that gets what was measured of each picture and prompt, of every model; None writes none.
        quick: fewer pictures, scales and steps.
        pictures: held-out pictures, at most. This and all numbers below: None is as `quick` and the model's size say.
        prompts: prompts to draw, at most.
        guidance: guidance scales to draw at.
        steps: numbers of steps, the first compared with the others.
        seen: file of subjects that the model was trained on, one a line; None is what the model says itself.
        judge: file of a judge of subjects and colours; None is the emoji family's own.
        features: folder of a local CLIP, DINO or other vision model, for distances in the judge's place; a whole CLIP
            or SigLIP, with its text tower and tokenizer, also measures how well pictures agree with their prompts.
        measures: measures of your own, each a `libreflux.probing.own.OwnMeasure`, the name of an entry point of an
            installed package, or "FILE.py:NAME".
        ocr: read the pictures whose prompts quote a text, and measure how many of its letters are right.
        resolution: side of the pictures in pixels; None is the model's.
        batch: pictures per forward pass.
        seed: of noise, pictures and intervals.
        dtype: of the weights: "stored", "fp32" or "bf16".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        progress: shows how far it is.
    """

    model: str
    _: KW_ONLY
    adapters: str | Path | Sequence[str | Path] = ()
    against: str | None = None
    reference: str | None = None
    controls: bool = True
    data: Path | str | None = None
    trained_on: str | Path | Sequence[str | Path] = ()
    out: Path | str | None = None
    csv: Path | str | None = None
    quick: bool = False
    pictures: int | None = None
    prompts: int | None = None
    guidance: Sequence[float] | None = None
    steps: Sequence[int] | None = None
    seen: Path | str | None = None
    judge: Path | str | None = None
    features: Path | str | None = None
    measures: Measures = ()
    ocr: bool = False
    resolution: int | None = None
    batch: int | None = None
    seed: int = 0
    dtype: str = "stored"
    device: str = "auto"
    progress: Progress = field(default=silent, repr=False, compare=False)

    def named_settings(self) -> Changes:
        """The settings of a probe that are given here: those that are not None."""
        given = {
            "pictures": self.pictures,
            "prompts": self.prompts,
            "batch": self.batch,
            "resolution": self.resolution,
            "guidance": None if self.guidance is None else tuple(map(float, self.guidance)),
            "steps": None if self.steps is None else tuple(map(int, self.steps)),
        }
        return cast("Changes", {name: value for name, value in given.items() if value is not None})

    def __post_init__(self) -> None:
        for name in ("guidance", "steps"):
            object.__setattr__(self, name, listed_numbers(getattr(self, name), name, whole=name == "steps"))


def check_options(options: ProbeOptions) -> None:
    """Refuses what can be refused without a model.

    Raises:
        OptionError: an option that has no effect, or a value that is none.
            That includes a resolution that is no multiple of 16, and a list with a number out of range or there twice.
    """
    if options.reference is not None and options.against is None:
        raise OptionError("needs `against`", "reference", hint="name the distilled model with `against`")
    if not options.controls and options.against is None:
        raise OptionError(
            "are drawn with `against` alone", "controls", hint="leave it out, or name the distilled model"
        )
    if options.features is not None and options.judge is not None:
        raise OptionError("takes the place of `judge`", "features", hint="give one of them")
    if options.ocr:
        if options.data is None:
            hint = "name a folder whose captions quote what is to be written, with `data`"
            raise OptionError("needs `data`", "ocr", hint=hint)
        require_reader()
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < least or (most is not None and value > most)):
            limits = f"{least} or more" if most is None else f"a whole number from {least} to {most}"
            raise OptionError(f"cannot be {value!r}", name, hint=f"use {limits}")
    check_side(options.resolution, "resolution")
    if options.dtype not in PRECISIONS:
        raise OptionError(f"{options.dtype!r} is no precision", "dtype", hint="use stored, fp32 or bf16")
    if options.guidance is not None:
        number_list(",".join(map(str, options.guidance)), "guidance", most=MOST_GUIDANCE)
    if options.steps is not None:
        number_list(",".join(map(str, options.steps)), "steps", whole=True, least=1, most=MOST_STEPS)
