"""Which of a run's checkpoints and averages is the best, and whether they differ at all."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from libreflux.errors import RunError
from libreflux.places import did_you_mean
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.sweep_options import FILE, PAGE, SHEET, WIDTHS, SweepOptions, check_options, report_of

if TYPE_CHECKING:
    import torch

    from libreflux.probing.trained import TrainingCheck
    from libreflux.recipe import Recipe
    from libreflux.training.hindsight import Kept
    from libreflux.workflows.probe_data import ProbeData
    from libreflux.workflows.probe_model import ProbedModel
    from libreflux.workflows.sweep_candidates import Candidate
    from libreflux.workflows.sweep_data import Place
    from libreflux.workflows.sweep_measure import Judged
    from libreflux.workflows.sweep_table import SweepRow, SweepTable


@dataclass(frozen=True)
class SweepResult:
    """What was found.

    Attributes:
        folder: of the result.
        page: an HTML page that shows it.
        sheet: the labelled sheet, a PNG; None where nothing was drawn.
        table: the candidates, the best first.
        out: the best one's adapter file; None where none was asked for.
        trained: what of the pictures the run was trained on; None where nothing is known.
        left_out: widths that the run's averages cannot form.
        made: how many candidates were made now; the others were there.
    """

    folder: Path
    page: Path
    sheet: Path | None
    table: SweepTable
    out: Path | None
    trained: TrainingCheck | None
    left_out: tuple[float, ...]
    made: int

    @property
    def sentence(self) -> str:
        """Whether the candidates differ at all."""
        return self.table.sentence

    @property
    def rows(self) -> tuple[SweepRow, ...]:
        """The candidates, the best first."""
        return self.table.rows

    @property
    def file(self) -> Path:
        """What holds the numbers."""
        return self.folder / FILE


def sweep_with(options: SweepOptions) -> SweepResult:
    """Compares what a run can give: its last checkpoint, LERP averages, and averages in hindsight.

    All are judged on the same held-out pictures under the same noise, by loss and calibration slope at each noise
    level, and drawn from the same noise at several guidance scales. Interrupted, the same call goes on after the last
    finished candidate. The best one is written only if `out` says where.

    Raises:
        OptionError: a value out of range, an option that has no effect, or no pictures to judge on.
        RunError: a run with fewer than two checkpoints, a damaged file in it, a width that cannot be formed, or a place
            that cannot be written.
        LibrefluxError: a model or picture that cannot be read.

    Example::

        import libreflux

        found = libreflux.sweep("runs/mine", data="photos-apart", lerps=[0.2], widths=[], guidance=[])
        print(found.sentence)
        print(found.rows[0].name, found.rows[0].to_last, found.page)
    """
    check_options(options)
    out, run = report_of(options), Path(options.run)
    recipe = _recipe(run)

    from libreflux.files import atomic_save_safetensors, lock
    from libreflux.model.device import make_current, pick_device
    from libreflux.training import hindsight
    from libreflux.workflows.probe_trained import check_places, places_of
    from libreflux.workflows.sweep_candidates import candidates_of
    from libreflux.workflows.sweep_data import place_of
    from libreflux.workflows.sweep_measure import Sweep
    from libreflux.workflows.sweep_table import table_of

    device = pick_device(options.device)
    make_current(device)
    check_places(places_of(options.trained_on))
    kept = hindsight.kept(run)
    candidates, left = candidates_of(kept, options.lerps, options.widths, WIDTHS)
    model = _model(options, recipe, kept, out)
    place = place_of(options, recipe, model)
    with lock(out):
        data, trained = _pictures(options, recipe, model, place, out, device)
        sweep = Sweep(kept, model, data, options.seeds, out, device)
        judged = sweep.judged(candidates, options.progress)
        table = table_of(judged, options.by, options.seed)
        sheet = out / SHEET if options.guidance else None
        best: Candidate = candidates[table.order[0]]
        result = SweepResult(out, out / PAGE, sheet, table, _path(options.out), trained, tuple(left), sweep.made)
        _write(options, result, data, judged, model)
        if result.out is not None:
            made = best.make(kept)
            atomic_save_safetensors(made.tensors, result.out, made.metadata)
    return result


def _path(out: Path | str | None) -> Path | None:
    return None if out is None else Path(out)


def _recipe(run: Path) -> Recipe:
    from libreflux.training import run_recipe

    if not run.is_dir():
        raise RunError("no such run folder", where=run, hint=did_you_mean(run, "give the `out` of a recipe"))
    if not (run / run_recipe.RECIPE).is_file():
        raise RunError("is no run folder: it has no recipe.json", where=run, hint="give the `out` of a recipe")
    return run_recipe.read(run / run_recipe.RECIPE)[0]


def _model(options: SweepOptions, recipe: Recipe, kept: Kept, out: Path) -> ProbedModel:
    """The model under the last checkpoint's facts; that adapter's own tensors are not kept in memory."""
    from libreflux.model.locate import told_model
    from libreflux.workflows.probe_model import ProbedModel

    name = options.model or told_model(recipe.model, kept.run)
    model = ProbedModel.read(name, [str(kept.checkpoints[-1].adapter)], out)
    files = [(dataclasses.replace(file, tensors={}), weight) for file, weight in model.files]
    return dataclasses.replace(model, files=files)


def _pictures(
    options: SweepOptions, recipe: Recipe, model: ProbedModel, place: Place, out: Path, device: torch.device
) -> tuple[ProbeData, TrainingCheck | None]:
    from libreflux.workflows.probe_trained import check_training, places_of
    from libreflux.workflows.sweep_data import sweep_data

    with options.progress("preparing", "item") as report:
        data = sweep_data(options, recipe, model, place, out, device, report)
    model.memory.save()
    return data, check_training(places_of(options.trained_on), model, data, None, out, options.progress)[0]


def _write(
    options: SweepOptions, result: SweepResult, data: ProbeData, judged: list[Judged], model: ProbedModel
) -> None:
    from libreflux.files import atomic_write_json, atomic_write_text
    from libreflux.probing.report.few import ENOUGH
    from libreflux.workflows import sweep_page

    run = Path(os.path.abspath(options.run)).name
    settings = data.settings
    told = {
        "schema": 1,
        "run": run,
        "sentence": result.sentence,
        "by": options.by,
        "model": {"name": model.name, "sha256": model.sha256, "base": settings.dtype},
        "data": {"name": settings.data[0], "sha256": settings.data[1], "pictures": settings.pictures},
        "sigmas": list(settings.sigmas),
        "seed": settings.seed,
        "resolution": settings.resolution,
        "drawn": {
            "prompts": [one.text for one in data.prompts],
            "seeds": list(options.seeds),
            "guidance": list(settings.guidance),
            "steps": settings.draw_steps,
        },
        "left_out": list(result.left_out),
        "differing_pairs": result.table.differ,
        "candidates": [row.as_json() for row in result.rows],
        "trained": None if result.trained is None else result.trained.as_json(),
    }
    atomic_write_json(result.file, told)  # first: the folder is known by it
    if result.sheet is not None:
        prompts = [one.text for one in data.prompts]
        sweep_page.write_sheet(result.sheet, result.folder, result.rows, prompts, options.seeds, settings.guidance)
    else:
        (result.folder / SHEET).unlink(missing_ok=True)  # of a call before, which drew
    notes = [f"Judged on: {settings.data[0]}."]
    if result.left_out:
        widths = ", ".join(f"{one:g}" for one in result.left_out)
        notes.append(f"Widths left out, which the run's averages cannot form: {widths}.")
    if len(data.held_out) < ENOUGH:
        notes.append(f"Fewer than {ENOUGH} pictures: intervals of values are too narrow, those of differences are not.")
    page = sweep_page.page(run, result.table, judged, result.trained, notes, result.sheet)
    atomic_write_text(result.page, page)


sweep = by_keywords(SweepOptions, sweep_with)
