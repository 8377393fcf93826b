"""What a probed model was trained on: by its adapters' runs, by what the user names, and by what its family says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.data.cached_pictures import is_cache
from libreflux.data.crops import cut
from libreflux.data.digests import FileMemory
from libreflux.data.folders import walk
from libreflux.data.pictures import load_rgb
from libreflux.data.sources import require_folder
from libreflux.errors import DataError
from libreflux.files import atomic_write_json
from libreflux.printing import get_logger
from libreflux.probing.compare_training import VERSION, Known, compare
from libreflux.probing.judges import Judge
from libreflux.probing.nearest_latents import crops_there
from libreflux.probing.pairs import keep_pairs
from libreflux.probing.results import Picture
from libreflux.probing.trained import TrainingCheck
from libreflux.probing.training_pictures import MeasuredPicture, SceneFinder, TrainingSet
from libreflux.result_key import digest
from libreflux.training import run_recipe
from libreflux.training.checkpoint import ADAPTER, AVERAGES
from libreflux.workflows.probe_data import ProbeData, view_of
from libreflux.workflows.probe_model import CACHE, ProbedModel
from libreflux.workflows.progress import Progress, Report
from libreflux.workflows.training_sets import of_cache, of_folder, of_run

logger = get_logger(__name__)

FILE = "trained.json"
"""Among a result's sections."""


def scene_finder(model: ProbedModel) -> SceneFinder | None:
    """What finds the nearest scene that a model's family trained it on; None: it is of no family that tells."""
    if not model.family:
        return None
    from libreflux.emoji.scene_finder import find_scene

    return find_scene


def check_training(
    trained_on: Sequence[Path], model: ProbedModel, data: ProbeData, judge: Judge | None, out: Path, progress: Progress
) -> tuple[TrainingCheck | None, list[Picture]]:
    """Whether the measured pictures were trained on, and the closest pairs; (None, []) where nothing is known.

    Args:
        trained_on: runs, caches and folders that the user names.
        model: with its adapters.
        data: what it is measured on.
        judge: says how near contents are.
        out: the result's folder.
        progress: shows how far it is.
    """
    with progress("reading", "training picture") as report:
        known = known_training(trained_on, model, out, report)
    if not known:
        return None, []
    with progress("comparing", "training picture") as report:
        measured = measured_pictures(data)
        key = _key(measured, known, data)
        kept = _read(out, key)
        if kept is None:
            view = view_of(data.settings)
            compared = compare(
                measured, known, view=view, judge=judge, cache=data.cache, progress=lambda done, of: report(done, of)
            )
            kept = compared.check, keep_pairs(out, measured, compared, view)
            if [one.whole for one in kept[0].sets] == [one.whole for one in known.sets]:  # else something is damaged
                _write(out, key, *kept)
    if remark := kept[0].remark:
        logger.warning("%s, of the pictures that it is measured on: %s", model.name, remark)
    return kept


def measured_pictures(data: ProbeData) -> list[MeasuredPicture]:
    """The pictures that a probe measures on, cut as they are measured."""
    captions: dict[str, str] = {}
    for part in data.held_out.batches(data.settings.batch):
        captions |= dict(zip(part.sample_ids, part.captions, strict=True))
    view = view_of(data.settings)
    return [
        MeasuredPicture(name, path, captions[name], cut(load_rgb(path), view, 0, name))
        for name, path in zip(data.held_out.sample_ids, data.held_out.paths, strict=True)
    ]


def check_places(trained_on: Sequence[Path]) -> None:
    """Raises DataError for one that is not there, or that is neither a run nor a cache and has no picture."""
    for path in trained_on:
        if path.is_file():
            raise DataError("is a file", where=path, hint="name a run, a cache, or a folder of pictures")
        require_folder(path)
        if not (is_cache(path) or (path / run_recipe.RECIPE).is_file() or walk(path).pictures):
            raise _no_picture(path)


def known_training(trained_on: Sequence[Path], model: ProbedModel, out: Path, report: Report) -> Known:
    """What is known: by the runs of the adapters, by the runs that those began with, and by what the user names.

    Not known is an adapter whose run nobody has, be it put on the model or merged into it. A run that the user names
    and that wrote the very file is the file's own.
    """
    found, strangers = _Found(out, report), dict[str, str]()
    for file, _ in model.files:
        run = run_of(Path(file.where))
        if run is None:
            strangers[Path(file.where).name] = file.sha256
        else:
            found.add_run(run)
    strangers |= merged_adapters(model.facts.lineage)
    for path in trained_on:
        if (path / run_recipe.RECIPE).is_file():
            if not found.add_run(path):
                raise _no_picture(path)
            strangers = {name: sha256 for name, sha256 in strangers.items() if not _wrote(path, sha256, out)}
            continue
        one = of_cache(path, out, report) if is_cache(path) else of_folder(path, out, report)
        if not one.pictures:
            raise _no_picture(path)
        found.sets[one.name] = one
    return Known(list(found.sets.values()), [*strangers, *found.unknown], scene_finder(model))


class _Found:
    """What is known so far.

    Attributes:
        sets: by their names.
        unknown: runs and adapters of which nobody knows what they were trained on.
    """

    def __init__(self, out: Path, report: Report) -> None:
        self.sets: dict[str, TrainingSet] = {}
        self.unknown: dict[str, None] = {}
        self._out, self._report = out, report
        self._runs: dict[Path, bool] = {}

    def add_run(self, run: Path) -> bool:
        """Adds a run, and the runs that it began with; False where none of its own pictures is known."""
        place = Path(os.path.realpath(run))
        if place in self._runs:
            return self._runs[place]
        found = of_run(run, self._out, self._report)
        self._runs[place] = bool(found.pictures.pictures)
        if self._runs[place]:
            self.sets[found.pictures.name] = found.pictures
        else:
            self.unknown[found.pictures.name] = None
        if found.began_with is not None:
            earlier = run_of(found.began_with)
            if earlier is None:
                self.unknown[f"{found.began_with.name}, with which {found.pictures.name} began"] = None
            else:
                self.add_run(earlier)
        return self._runs[place]


def merged_adapters(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Name to SHA-256 of the adapters that a model says were merged into it, and into what it was made from."""
    rows = lineage.get("adapters")
    told = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    found = {f"{row.get('file')} (merged)": str(row.get("sha256")) for row in told}
    base = lineage.get("base_lineage")
    return found | (merged_adapters(base) if isinstance(base, dict) else {})


def _wrote(run: Path, sha256: str, out: Path) -> bool:
    """Whether a run has this very adapter: as its result, in a checkpoint, or as an average."""
    names = [f"{folder}{file}" for folder in ("", "*/*/") for file in (ADAPTER, AVERAGES)]
    memory = FileMemory(out / CACHE)
    wrote = any(memory.sha256(path) == sha256 for name in names for path in run.glob(name))
    memory.save()
    return wrote


def _no_picture(path: Path) -> DataError:
    return DataError("no picture in it", where=path, hint="name a run, a cache, or a folder of pictures")


def run_of(adapter: Path) -> Path | None:
    """The run folder that an adapter's file, or a link to it, lies in: its result, one of its checkpoints or averages.

    A run folder is its own.
    """
    places = [Path(os.path.abspath(adapter)), Path(os.path.realpath(adapter))]
    above = [folder for place in places for folder in (place, *list(place.parents)[:3])]
    return next((folder for folder in above if (folder / run_recipe.RECIPE).is_file()), None)


def _key(measured: Sequence[MeasuredPicture], known: Known, data: ProbeData) -> str:
    view = view_of(data.settings)
    pictures = [[one.id, one.path and one.path.name, one.background, one.trained] for one in known.pictures]
    sets = [
        [one.name, sorted(each.id for each in one.pictures), str(one.cache), one.whole, crops_there(one, view)]
        for one in known.sets
    ]
    finder = None if known.find_scene is None else getattr(known.find_scene, "__module__", "")
    told = [pictures, sets, list(known.unknown), data.settings.judge, data.cache.settings, finder]
    seen_in = [view.name(0, "white"), [[one.id, one.path.name, one.caption] for one in measured]]
    return digest([VERSION, told, seen_in])


def _read(out: Path, key: str) -> tuple[TrainingCheck, list[Picture]] | None:
    """What was found before; None if it is not there, damaged, of another key, or lacks a picture."""
    try:
        rows = plainjson.parse((out / "sections" / FILE).read_text(encoding="utf-8"))
        if rows["schema"] != 1 or rows["key"] != key:
            return None
        pairs = [Picture.from_json(row, out) for row in rows["pictures"]]
        whole = all((out / one.file).is_file() for one in pairs)
        return (TrainingCheck.from_json(rows["trained"]), pairs) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(out: Path, key: str, check: TrainingCheck, pairs: Sequence[Picture]) -> None:
    rows = {"schema": 1, "key": key, "trained": check.as_json(), "pictures": [one.as_json() for one in pairs]}
    atomic_write_json(out / "sections" / FILE, rows)


def places_of(trained_on: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths as the user gave them: one, several or none."""
    listed: Iterable[str | Path] = [trained_on] if isinstance(trained_on, str | Path) else trained_on
    return [Path(os.path.expanduser(path)) for path in listed]
