"""What a probed model was trained on: by its adapters' runs, by what the user names, and by what its family says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from libreflux import plainjson
from libreflux.data.cached_pictures import cached_ids, is_cache
from libreflux.data.crops import cut
from libreflux.data.digests import FileMemory
from libreflux.data.folders import walk
from libreflux.data.held_out import places
from libreflux.data.pictures import load_rgb
from libreflux.data.progress import ProgressCount
from libreflux.data.sources import require_folder
from libreflux.errors import DataError, LibrefluxError
from libreflux.files import atomic_write_json
from libreflux.printing import get_logger
from libreflux.probing.compare_training import VERSION, Known, compare
from libreflux.probing.judges import Judge
from libreflux.probing.pairs import keep_pairs
from libreflux.probing.results import Picture
from libreflux.probing.trained import TrainingCheck
from libreflux.probing.training_pictures import MeasuredPicture, SceneFinder, TrainingPicture, TrainingSet
from libreflux.recipe import DataSource, Recipe
from libreflux.result_key import digest
from libreflux.training import run_recipe
from libreflux.workflows.probe_data import ProbeData, view_of
from libreflux.workflows.probe_model import CACHE, ProbedModel
from libreflux.workflows.progress import Progress, Report

logger = get_logger(__name__)

FILE = "trained.json"
"""Among a result's sections."""
_ID = 32  # digits of `Sample.id`


def scene_finder(model: ProbedModel) -> SceneFinder | None:
    """What finds the nearest scene that a model of the emoji family was trained on; None: nobody says.

    To be filled by the family, for models of which `ProbedModel.family` is true: a `SceneFinder` is told a measured
    picture with its id, file, caption and pixels.
    """
    return None


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
        kept = None if known.find_scene is not None else _read(out, key)
        if kept is None:
            view = view_of(data.settings)
            compared = compare(
                measured, known, view=view, judge=judge, cache=data.cache, progress=lambda done, of: report(done, of)
            )
            kept = compared.check, keep_pairs(out, measured, compared, view)
            _write(out, key, *kept)
    if remark := kept[0].remark:
        logger.warning("%s is measured on pictures that are %s", model.name, remark)
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
        require_folder(path)
        if not (is_cache(path) or (path / run_recipe.RECIPE).is_file() or walk(path).pictures):
            raise _no_picture(path)


def known_training(trained_on: Sequence[Path], model: ProbedModel, out: Path, report: Report) -> Known:
    """What is known; the runs of adapters first. Who names something says all that they know of the other adapters."""
    sets, unknown = list[TrainingSet](), list[str]()
    for file, _ in model.files:
        run = run_of(Path(file.where))
        found = None if run is None else _of_run(run, out, report)
        if found is None or not found.pictures:
            unknown.append(Path(file.where).name)
        else:
            sets.append(found)
    for path in trained_on:
        run = path if (path / run_recipe.RECIPE).is_file() else None
        found = _of_cache(path, out) if is_cache(path) else None
        found = found or (_of_folder(path, out, report) if run is None else _of_run(run, out, report))
        if not found.pictures:
            raise _no_picture(path)
        sets.append(found)
    distinct = {one.name: one for one in sets}
    return Known(list(distinct.values()), () if trained_on else unknown, scene_finder(model))


def _no_picture(path: Path) -> DataError:
    return DataError("no picture in it", where=path, hint="name a run, a cache, or a folder of pictures")


def run_of(adapter: Path) -> Path | None:
    """The run folder that an adapter's file lies in: its result, one of its checkpoints or of its averages."""
    above = list(Path(os.path.abspath(adapter)).parents)[:3]
    return next((folder for folder in above if (folder / run_recipe.RECIPE).is_file()), None)


def _of_run(run: Path, out: Path, report: Report) -> TrainingSet:
    """All that the run's cache and its data folders hold, but for what it held out; empty if none of them is left."""
    name = os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run)
    try:
        recipe = run_recipe.read(run / run_recipe.RECIPE)[0]
    except LibrefluxError as error:
        logger.warning("%s", error)
        return TrainingSet(name, [])
    cache = next((folder for folder in (recipe.cache_dir, run / CACHE) if is_cache(folder)), None)
    found = {} if cache is None else {one.id: one for one in _of_cache(cache, out).pictures}
    for source in recipe.data:
        found |= {one.id: one for one in _of_source(source, cache, out, report)}
    return TrainingSet(name, _trained(list(found.values()), recipe, cache, out, report), cache)


def _trained(
    pictures: Sequence[TrainingPicture], recipe: Recipe, cache: Path | None, out: Path, report: Report
) -> list[TrainingPicture]:
    """Without those that the recipe holds out, which its cache holds too."""
    apart = set[str]()
    if (path := recipe.held_out.path) is not None:
        apart = {one.id for one in _of_source(DataSource(path=path), cache, out, report)}
        if not apart:
            logger.warning("%s has gone: what this run held out counts as trained on", path)
    below = places([one.id for one in pictures]) < recipe.held_out.share
    return [one for one, held in zip(pictures, below, strict=True) if not held and one.id not in apart]


def _of_source(source: DataSource, cache: Path | None, out: Path, report: Report) -> list[TrainingPicture]:
    """The pictures of a recipe's source; none where its folder has gone or cannot be read any more."""
    folder = Path(source.path).expanduser()
    try:
        found = _of_folder(folder, out, report, cache).pictures if folder.is_dir() else []
    except DataError as error:
        logger.warning("%s: not compared", error)
        return []
    return [dataclasses.replace(one, background=source.background) for one in found]


def _of_folder(folder: Path, out: Path, report: Report, cache: Path | None = None) -> TrainingSet:
    paths = walk(folder).pictures
    memory = FileMemory(out / CACHE, [] if cache is None else [cache])
    bar = ProgressCount(lambda done, total, note: report(done, total, note))
    looked = zip(paths, memory.inspect(paths, bar), strict=True)
    found = {one.digest[:_ID]: path for path, one in looked if one.digest and not one.fault}
    memory.save()
    return TrainingSet(str(folder), [TrainingPicture(name, path) for name, path in found.items()])


def _of_cache(cache: Path, out: Path) -> TrainingSet:
    """The pictures of a cache, with the files that they were read from, where those are there and unchanged."""
    ids = cached_ids(cache)
    remembered, memory = FileMemory(cache), FileMemory(out / CACHE, [cache])
    there = {name: path for name, path in _files_of(ids, remembered) if memory.sha256(path)[:_ID] == name}
    memory.save()
    return TrainingSet(str(cache), [TrainingPicture(name, there.get(name)) for name in sorted(ids)], cache)


def _files_of(ids: set[str], memory: FileMemory) -> Iterable[tuple[str, Path]]:
    return (each for each in memory.paths_of(ids) if each[1].is_file()) if ids else ()


def _key(measured: Sequence[MeasuredPicture], known: Known, data: ProbeData) -> str:
    pictures = [[one.id, one.path is not None, one.background] for one in known.pictures]
    sets = [[one.name, sorted(each.id for each in one.pictures), str(one.cache)] for one in known.sets]
    told = [pictures, sets, list(known.unknown), data.settings.judge, data.cache.settings]
    view = [view_of(data.settings).name(0, "white"), [[one.id, one.path.name, one.caption] for one in measured]]
    return digest([VERSION, told, view])


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
