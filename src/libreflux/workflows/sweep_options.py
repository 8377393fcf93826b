"""What may be said of a sweep over a run's averages, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.errors import OptionError, RunError
from libreflux.places import file_place, folder_place, new_place
from libreflux.values import MOST_NUMBERS, check_side, listed_numbers
from libreflux.workflows.picture_options import check_picture, check_texts, check_whole, listed
from libreflux.workflows.progress import Progress, silent

LERPS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
"""Weights of the newest: the report's list, and before it 0.1, which is the average with a decay of 0.9."""
WIDTHS = (0.03, 0.05, 0.08, 0.1, 0.15, 0.2)
"""Relative widths of averages in hindsight; those that the run's averages cannot form are left out."""
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
MEASURES = ("loss", "slope")
FILE, PAGE, SHEET = "sweep.json", "index.html", "sheet.png"
SWEEPS = Path("out/sweep")
FOLDERS = ("cache", "candidates", "data", "pictures", "sections")


@dataclass(frozen=True)
class SweepOptions:
    """What is compared, and on what.

    Attributes:
        run: a run folder, with two checkpoints or more.
        data: folder of captioned pictures that the run was not trained on; None is what its recipe holds out, or the
            emoji family's own.
        out: adapter file that the best one is written to; it must not exist yet. None writes none.
        report: folder of the result, which is continued; None is out/sweep/NAME.
        lerps: weights of the newest in LERP averages over the checkpoints, in (0, 1); () is none.
        widths: relative widths of averages in hindsight, 0.01 to 0.28; () is none, None those of a list that the run's
            averages can form. Of a run that tracked none, raw checkpoints are averaged with these widths.
        by: what is the best: "loss", the lowest loss on the pictures, or "slope", the calibration nearest to 1; both
            are means over the noise levels.
        sigmas: noise levels in (0, 1), at most ten.
        pictures: at most so many.
        prompts: what is drawn; () is two of the pictures' captions.
        guidance: guidance scales to draw at; () draws nothing.
        seeds: each prompt is drawn from each.
        steps: sampling steps; None is the adapter's own.
        trained_on: runs, caches and folders of pictures that were trained on, beside what the run itself tells.
        model: what the adapters are put on; None is the model of the run's recipe.
        resolution: side of the pictures in pixels; None is the recipe's smallest.
        batch: pictures per forward pass; None is 8, or 1 for a model of billions of parameters.
        seed: of the noise and of the intervals.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        progress: shows how far it is.
    """

    run: Path | str
    _: KW_ONLY
    data: Path | str | None = None
    out: Path | str | None = None
    report: Path | str | None = None
    lerps: Sequence[float] = LERPS
    widths: Sequence[float] | None = None
    by: str = "loss"
    sigmas: Sequence[float] = SIGMAS
    pictures: int = 64
    prompts: str | Sequence[str] = ()
    guidance: Sequence[float] = (1, 2, 3, 4, 5, 6)
    seeds: Sequence[int] = (0,)
    steps: int | None = None
    trained_on: str | Path | Sequence[str | Path] = ()
    model: str | None = None
    resolution: int | None = None
    batch: int | None = None
    seed: int = 0
    device: str = "auto"
    progress: Progress = field(default=silent, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("lerps", "widths", "sigmas", "guidance", "seeds"):
            object.__setattr__(self, name, listed_numbers(getattr(self, name), name, whole=name == "seeds"))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts, of one or of several."""
        return listed(self.prompts)


def check_options(options: SweepOptions) -> None:
    """Refuses what can be refused without a run, and tries the places that are written.

    Raises:
        OptionError: a value out of range, or an option that has no effect.
        RunError: a place that cannot be written, or an `out` that exists.
    """
    _check_numbers(options)
    _check_drawing(options)
    if options.out is not None:
        if Path(options.out).suffix != ".safetensors":
            raise RunError("the name of an adapter file ends in .safetensors", where=options.out, hint="add it")
        new_place(Path(options.out))
    try_report(report_of(options))


def report_of(options: SweepOptions) -> Path:
    """The folder of the result."""
    return SWEEPS / Path(options.run).resolve().name if options.report is None else Path(options.report)


def try_report(report: Path) -> None:
    """Raises RunError unless the folder is free, or of a sweep, whole or not, and can be written."""
    folder_place(report, *FOLDERS)
    for name in (FILE, PAGE, SHEET):
        file_place(report / name)
    if not report.is_dir() or (report / FILE).is_file():
        return
    if any(path.name not in FOLDERS and not path.name.startswith(".") for path in report.iterdir()):
        raise RunError("holds something else", where=report, hint="name another folder, or an empty one")


def _check_numbers(options: SweepOptions) -> None:
    for name, least, most in (("pictures", 2, None), ("seed", 0, None), ("batch", 1, None), ("resolution", 16, 8192)):
        if (value := getattr(options, name)) is not None:
            check_whole(name, value, least, most)
    check_side(options.resolution, "resolution")
    if options.by not in MEASURES:
        raise OptionError(f"no measure {options.by!r}", "by", hint=f"use {' or '.join(MEASURES)}")
    _check_list("sigmas", options.sigmas, 0, 1, "0.1,0.5,0.9", most=10)
    _check_list("lerps", options.lerps, 0, 1, "0.2,0.9 (1 is the last checkpoint, which is always there)", least=0)
    if options.widths is not None:
        _check_list("widths", options.widths, 0.0099999, 0.2800001, "0.05,0.1; they are from 0.01 to 0.28", least=0)
    if not (options.lerps or options.widths is None or options.widths):
        raise OptionError("without `lerps` nothing is left to compare", "widths", hint="give some of either")


def _check_list(
    name: str, values: Sequence[float], low: float, high: float, example: str, *, least: int = 1, most: int = 100
) -> None:
    if not least <= len(values) <= most or len(set(values)) < len(values):
        raise OptionError(f"needs {least} to {most} different numbers", name, hint=f"write {example}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            raise OptionError(f"cannot be {value!r}", name, hint=f"write {example}")


def _check_drawing(options: SweepOptions) -> None:
    check_texts("prompts", options.texts)
    _check_list("guidance", options.guidance, -1e-9, 1e4, "1:6:1", least=0)
    _check_list("seeds", options.seeds, -1, 2**63, "0,1")
    for seed in options.seeds:
        check_whole("seeds", seed, 0)
    if len(options.texts) * len(options.seeds) > MOST_NUMBERS:
        raise OptionError(f"more than {MOST_NUMBERS:,} pictures of each", "prompts", hint="give fewer")
    if options.steps is not None:
        check_picture(None, None, options.steps)
    if not options.guidance and (options.texts or options.steps is not None):
        name = "prompts" if options.texts else "steps"
        raise OptionError("has no effect without `guidance`", name, hint="name the scales to draw at with `guidance`")
