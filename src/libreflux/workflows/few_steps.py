"""What an adapter did to a distilled model: how much of the few steps it kept, and how much it learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.printing import get_logger
from libreflux.workflows.few_steps_options import FILE, PAGE, FewStepsOptions, check_options
from libreflux.workflows.keywords import by_keywords

if TYPE_CHECKING:
    from libreflux.probing.few_steps import Point
    from libreflux.probing.results import Picture
    from libreflux.probing.trained import TrainingCheck
    from libreflux.workflows.few_steps_data import JudgeFile
    from libreflux.workflows.few_steps_measure import Checkup
    from libreflux.workflows.few_steps_models import Subjects

logger = get_logger(__name__)

WEAK = (
    "noise of the same norm hurts less than training did, so that it is no measure of what is lost: name a broken "
    "adapter"
)
BLIND = (
    "the judge finds what was asked for in {ceiling:.0%} of the new pictures, and in {usual:.0%} of those that the "
    "distilled model draws: where the adapter changes the look of all pictures, accuracy says nothing"
)
MOST_SHOWN = 6
"""Checkpoints of a run whose pictures a page shows."""


@dataclass(frozen=True)
class FewStepsResult:
    """What was found.

    Attributes:
        folder: of the result.
        page: an HTML page that shows it.
        points: of each checkpoint of a run, by step, or of the one adapter.
        best: the one to stop at; of one adapter that one.
        stop: the sentence that says so; of one adapter what it kept and learnt.
        made: how many sets of pictures were drawn now; the others were there.
        remark: what makes the shares doubtful; "" where nothing does.
    """

    folder: Path
    page: Path
    points: tuple[Point, ...]
    best: Point
    stop: str
    made: int
    remark: str = ""

    @property
    def file(self) -> Path:
        """What holds the numbers."""
        return self.folder / FILE


def probe_few_steps_with(options: FewStepsOptions) -> FewStepsResult:
    """Tells how much of few-step drawing an adapter kept, how much it learnt, and what it did to guidance.

    Of a run, all whole checkpoints are measured, and one is named to stop at. Interrupted, the same call goes on after
    the last finished set of pictures. What the shares are is on the page.

    Raises:
        OptionError: `data` or `prompts` is missing, a distilled model of many steps, or a value out of range.
        AdapterError: a training adapter, or one of other weights where `against` is not named.
        LibrefluxError: a model or picture that cannot be read, or a folder that cannot be written.

    Example::

        import libreflux

        found = libreflux.probe_few_steps("emoji-schnell", adapters="runs/mine", data="photos", prompts="others.txt")
        print(found.stop)
        print(found.points[-1].sentence, found.page)
    """
    check_options(options)

    from libreflux.files import lock
    from libreflux.model.device import make_current, pick_device
    from libreflux.probing.few_steps import stop
    from libreflux.workflows.few_steps_data import check_places, encoded, judge_of
    from libreflux.workflows.few_steps_measure import Checkup
    from libreflux.workflows.few_steps_models import read_subjects
    from libreflux.workflows.probe_trained import check_places as check_trained_on
    from libreflux.workflows.probe_trained import check_training, places_of

    device = pick_device(options.device)
    make_current(device)
    check_places(options)
    trained_on = places_of(options.trained_on)
    check_trained_on(trained_on)
    subjects = read_subjects(options)
    judge = judge_of(options, subjects.distilled.model)
    with lock(options.result):
        with options.progress("preparing", "item") as report:
            data = encoded(options, subjects, judge, device, report)
        for one in (subjects.distilled, subjects.adapted[-1]):
            one.model.memory.save()
        checkup = Checkup(subjects, data, judge, options.result, device)
        points = checkup.points(options.progress)
        last = subjects.adapted[-1].model
        trained, pairs = check_training(trained_on, last, checkup.first, None, options.result, options.progress)
        best, told = stop(points, options.keep) if len(points) > 1 else (points[0], points[0].sentence)
        remarks = list(_remarks(checkup, points))
        for doubt in remarks:
            logger.warning("%s", doubt)
        remark = "; ".join(remarks)
        result = FewStepsResult(options.result, options.result / PAGE, tuple(points), best, told, checkup.made, remark)
        _write(options, result, checkup, judge, trained, pairs)
    return result


def _remarks(checkup: Checkup, points: Sequence[Point]) -> Iterator[str]:
    """What makes the shares doubtful."""
    if checkup.subjects.broken.noise is not None and any(map(_is_past_broken, points)):
        yield WEAK
    ends = checkup.ends
    if ends.is_blind and ends.ceiling is not None:
        usual = ends.of_others["distilled"]["accuracy"].value
        yield BLIND.format(ceiling=ends.ceiling.value, usual=usual)


def _is_past_broken(one: Point) -> bool:
    kept, _ = one.leading
    return not kept.noisy and kept.high < 0


def _write(
    options: FewStepsOptions,
    result: FewStepsResult,
    checkup: Checkup,
    judge: JudgeFile,
    trained: TrainingCheck | None,
    pairs: Sequence[Picture],
) -> None:
    from libreflux.files import atomic_write_json, atomic_write_text
    from libreflux.probing.report.few_steps import Shown, page
    from libreflux.probing.results import Result
    from libreflux.probing.unit_table import write_table
    from libreflux.sample.metadata import versions

    subjects, settings, points = checkup.subjects, checkup.first.settings, result.points
    ends = checkup.end_measures()
    told = {
        "schema": 1,
        "stop": result.stop,
        "best": result.best.name,
        "remark": result.remark,
        "keep": options.keep,
        "model": {"name": options.model, "adapters": list(options.named)},
        "models": _models(subjects),
        "steps": subjects.steps,
        "settings": settings.as_json(),
        "prompts": [one.text for one in checkup.first.prompts],
        "points": [one.as_json() for one in points],
        "ends": [row.as_json() | {"replicates": []} for row in ends],
        "trained": None if trained is None else trained.as_json(),
        "versions": versions(),
    }
    atomic_write_json(result.file, told)  # first: the folder is known by it
    names = checkup.first.names
    if options.csv is not None:
        rows = [("distilled and broken", ends), *((one.name, one.measures) for one in points)]
        tables = [
            Result(model={"name": name}, settings={}, versions={}, seconds=0.0, measures=list(each), names=names)
            for name, each in rows
        ]
        write_table(tables, Path(options.csv))
    chosen = _some([*zip(points, subjects.adapted, strict=True)], result.best)
    sheets = checkup.sheets([subject for _, subject in chosen])
    shown = Shown(
        model=options.model,
        distilled=subjects.distilled.name,
        broken=subjects.broken.name,
        steps=subjects.steps,
        guidance=settings.own_guidance,
        resolution=settings.resolution,
        data=settings.data[0],
        pictures=settings.pictures,
        prompts=settings.prompts,
        keep=options.keep,
        held_out="" if trained is None else trained.verdict,
        remark=result.remark,
    )
    text = page(shown, result.stop, points, ends, result.folder, [(one.texts, one.rows) for one in sheets])
    atomic_write_text(result.page, text)


def _models(subjects: Subjects) -> list[dict[str, Any]]:
    rows = [("distilled", subjects.distilled), ("broken", subjects.broken)]
    rows += [("adapted", one) for one in subjects.adapted]
    return [{"role": role, "called": one.name, **one.model.as_json()} for role, one in rows]


def _some(points: Sequence[tuple[Point, Any]], best: Point) -> list[tuple[Point, Any]]:
    """`MOST_SHOWN` of a curve, evenly, with the last and the one to stop at."""
    count = len(points)
    if count <= MOST_SHOWN:
        return list(points)
    rows = {round(row * (count - 1) / (MOST_SHOWN - 2)) for row in range(MOST_SHOWN - 1)}
    rows.add(next(row for row, (one, _) in enumerate(points) if one is best))
    return [points[row] for row in sorted(rows)]


probe_few_steps = by_keywords(FewStepsOptions, probe_few_steps_with)
