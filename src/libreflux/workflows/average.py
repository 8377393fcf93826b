"""Another average of what a run has kept, after training."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from libreflux.errors import OptionError, RunError
from libreflux.places import new_place
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import check_whole


@dataclass(frozen=True)
class AverageOptions:
    """Which average is made. One of `width` and `lerp` is needed.

    Attributes:
        run: a run folder.
        out: adapter file to write; it must not exist yet.
        width: relative width (sigma_rel) of a power-function average, 0.01 to 0.28.
        step: at this step, with `width`; None is the newest one that was kept.
        lerp: weight of the NEWEST in s = (1 - lerp) s + lerp new, over the checkpoints.
    """

    run: Path | str
    _: KW_ONLY
    out: Path | str
    width: float | None = None
    step: int | None = None
    lerp: float | None = None


@dataclass(frozen=True)
class AverageResult:
    """What was made.

    Attributes:
        out: the adapter file.
        steps: of the sources, rising; a step with two tracked widths is there twice.
        error: relative L2 error of the average's profile over the steps; None for LERP.
        gap: how far averaging factors, not products, moved the adapter, relative to its norm.
        worst: the layer that was moved most, and by how much.
    """

    out: Path
    steps: tuple[int, ...]
    error: float | None
    gap: float
    worst: tuple[str, float]


def average_with(options: AverageOptions) -> AverageResult:
    """Averages what a run has kept: any width in hindsight, or LERP over its checkpoints.

    Raises:
        OptionError: none or both of `width` and `lerp`, or a step beside `lerp`.
        RunError: nothing to average, a value out of range, a damaged file, or an `out` that exists.

    Example::

        import libreflux

        made = libreflux.average("runs/mine", width=0.1, out="mine-0.1.safetensors")
        print(f"{len(made.steps)} sources, {made.error:.2%} off the profile")
    """
    out = Path(options.out)
    if (options.width is None) == (options.lerp is None):
        raise OptionError("one of `width` and `lerp` is needed", None, hint="`width` 0.1 is a good start")
    if options.step is not None and options.width is None:
        raise OptionError("`step` belongs to `width`", None, hint="remove it")
    if options.step is not None:
        check_whole("step", options.step, 0)
    if out.suffix != ".safetensors":
        raise RunError("the name of an adapter file ends in .safetensors", where=out, hint="add it")
    new_place(out)

    from libreflux import files
    from libreflux.training import hindsight

    run = Path(options.run)
    if options.width is not None:
        made = hindsight.average(run, options.width, options.step)
    else:
        made = hindsight.lerp(run, options.lerp or 0.0)
    files.atomic_save_safetensors(made.tensors, out, made.metadata)
    error = None if options.width is None else made.error
    return AverageResult(out, tuple(made.steps), error, made.gap, made.worst)


average = by_keywords(AverageOptions, average_with)
