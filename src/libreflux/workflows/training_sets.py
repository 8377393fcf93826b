"""The pictures that a run has trained on, that a cache holds, or that lie in a folder.

A run's own pictures are those of its cache that were read from one of its data folders: a cache can serve several runs,
and a folder can have got new pictures since. What a run held out, and what it kept for regularisation, it has not
learnt.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux.data.cache import index_folders
from libreflux.data.cached_pictures import is_cache, read_ids
from libreflux.data.digests import FileMemory
from libreflux.data.folders import walk
from libreflux.data.held_out import places
from libreflux.data.pictures import Inspected
from libreflux.data.progress import ProgressCount
from libreflux.errors import DataError, LibrefluxError
from libreflux.printing import get_logger
from libreflux.probing.training_pictures import TrainingPicture, TrainingSet
from libreflux.recipe import DataSource, Recipe
from libreflux.training import run_recipe
from libreflux.workflows.probe_model import CACHE
from libreflux.workflows.progress import Report

logger = get_logger(__name__)

_ID = 32  # digits of `Sample.id`


@dataclass(frozen=True)
class RunTraining:
    """What a run folder tells.

    Attributes:
        pictures: empty where none can be named.
        began_with: the adapter that the run began with; None: with none.
    """

    pictures: TrainingSet
    began_with: Path | None


def of_run(run: Path, out: Path, report: Report) -> RunTraining:
    """What a run was trained on, and what it began with.

    Args:
        run: its folder.
        out: the result's folder, where files are remembered.
        report: told of files that are read.
    """
    name = os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run)
    try:
        recipe, _, forks = run_recipe.read(run / run_recipe.RECIPE)
    except LibrefluxError as error:
        logger.warning("%s", error)
        return RunTraining(TrainingSet(name, [], whole=False), None)
    base = _base_of(run, recipe)
    sources = [one for one in (*recipe.data, *_of_forks(forks)) if not one.regularisation]
    cache = _cache_of(run, recipe, base)
    if cache is None:
        found, whole = _from_folders(sources, base, out, report), False
    else:
        found, whole = _from_cache(sources, base, cache, out, report)
    below = places([one.id for one in found]) < recipe.held_out.share
    kept = [one for one, held in zip(found, below, strict=True) if not held]
    start = recipe.adapter.init_from
    began = None if start is None else _placed(Path(start).expanduser(), base)
    return RunTraining(TrainingSet(name, kept, cache, whole), began)


def of_cache(cache: Path, out: Path, report: Report) -> TrainingSet:
    """All pictures of a cache, of which nobody says whether they were trained on."""
    ids, unread = read_ids(cache)
    there = _whole_files(_rows(ids, cache, out), cache, out, report)
    pictures = [TrainingPicture(name, there[name][0] if name in there else None, trained=False) for name in sorted(ids)]
    return TrainingSet(str(cache), pictures, cache, not unread)


def of_folder(folder: Path, out: Path, report: Report, least: int = 0, background: str = "white") -> TrainingSet:
    """The pictures of a folder whose shorter side has `least` pixels or more."""
    paths = walk(folder).pictures
    memory = FileMemory(out / CACHE)
    looked = list(zip(paths, memory.inspect(paths, _bar(report)), strict=True))
    memory.save()
    found = {
        one.digest[:_ID]: path
        for path, one in looked
        if one.digest and not one.fault and min(one.width, one.height) >= least
    }
    return TrainingSet(str(folder), [TrainingPicture(name, path, background) for name, path in found.items()])


def _base_of(run: Path, recipe: Recipe) -> Path | None:
    """The folder that a recipe's paths begin in; None where neither its `out` nor the run's own place tells."""
    out, here = Path(os.path.normpath(recipe.out)).parts, Path(os.path.abspath(run)).parts
    told = bool(out) and not Path(recipe.out).is_absolute() and here[-len(out) :] == out
    return Path(*here[: -len(out)]) if told else None


def _placed(path: Path, base: Path | None) -> Path:
    return path if path.is_absolute() or base is None else base / path


def _cache_of(run: Path, recipe: Recipe, base: Path | None) -> Path | None:
    return next((folder for folder in (_placed(recipe.cache_dir, base), run / CACHE) if is_cache(folder)), None)


def _of_forks(forks: Sequence[Mapping[str, Any]]) -> list[DataSource]:
    """The data folders that a run left at a fork."""
    changed = (pair for fork in forks for pair in dict(fork.get("changed") or {}).items())
    return [
        DataSource(path=before) for key, (before, *_) in changed if before and re.fullmatch(r"data\.\d+\.path", key)
    ]


def _from_folders(sources: Sequence[DataSource], base: Path | None, out: Path, report: Report) -> list[TrainingPicture]:
    """What lies in the folders now, where no cache says what was trained on."""
    found: dict[str, TrainingPicture] = {}
    for source in sources:
        folder = Path(source.path).expanduser()
        if base is None and not folder.is_absolute():
            logger.warning("%s: not known from where this path begins", folder)
            continue
        try:
            own = of_folder(_placed(folder, base), out, report, source.min_size, source.background).pictures
        except DataError as error:
            logger.warning("%s: not compared", error)
            continue
        found |= {one.id: one for one in own}
    return list(found.values())


def _from_cache(
    sources: Sequence[DataSource], base: Path | None, cache: Path, out: Path, report: Report
) -> tuple[list[TrainingPicture], bool]:
    """Pictures of the cache that were read from one of the folders, and whether the origin of all of it is known."""
    ids, unread = read_ids(cache)
    rows = _rows(ids, cache, out)
    there = _whole_files(rows, cache, out, report)
    found: dict[str, TrainingPicture] = {}
    for source in sources:
        own: dict[str, TrainingPicture] = {}
        for name in _read_from(source, base, rows):
            file, looked = there.get(name, (None, None))
            if looked is None or min(looked.width, looked.height) >= source.min_size:
                own[name] = TrainingPicture(name, file, source.background)
        found |= _moved(source, base, own, out, report)
    return list(found.values()), not unread and ids <= {name for name, _ in rows}


def _read_from(source: DataSource, base: Path | None, rows: Sequence[tuple[str, Path]]) -> list[str]:
    """The ids that were read from a data folder. If all has been moved since with the run, its own names tell it."""
    folder = Path(source.path).expanduser()
    below, linked = _placed(folder, base), _links_of(source, base)
    found = [name for name, path in rows if _is_below(path, below) or str(path) in linked]
    return found or [name for name, path in rows if not folder.is_absolute() and _is_below(path, folder)]


def _moved(
    source: DataSource, base: Path | None, own: dict[str, TrainingPicture], out: Path, report: Report
) -> dict[str, TrainingPicture]:
    """The same pictures, with files for those that lie in the folder today and were read from another place."""
    folder = _placed(Path(source.path).expanduser(), base)
    if not folder.is_absolute() or not folder.is_dir() or all(one.path is not None for one in own.values()):
        return own
    try:
        today = {one.id: one.path for one in of_folder(folder, out, report, source.min_size).pictures}
    except DataError as error:
        logger.warning("%s: not compared", error)
        return own
    return {name: dataclasses.replace(one, path=one.path or today.get(name)) for name, one in own.items()}


def _rows(ids: Collection[str], cache: Path, out: Path) -> list[tuple[str, Path]]:
    """(id, real path) of all files that the cache's pictures were read from."""
    folders = _memories(cache)
    return list(FileMemory(out / CACHE, folders).paths_of(set(ids), folders)) if ids else []


def _memories(cache: Path) -> list[Path]:
    return list(dict.fromkeys((cache, *index_folders(cache))))


def _whole_files(
    rows: Iterable[tuple[str, Path]], cache: Path, out: Path, report: Report
) -> dict[str, tuple[Path, Inspected]]:
    """Of each picture a file that is there and unchanged."""
    left = [(name, path) for name, path in rows if path.is_file()]
    memory = FileMemory(out / CACHE, _memories(cache))
    looked = list(memory.inspect([path for _, path in left], _bar(report)))
    memory.save()
    return {name: (path, one) for (name, path), one in zip(left, looked, strict=True) if one.digest[:_ID] == name}


def _links_of(source: DataSource, base: Path | None) -> set[str]:
    """Real paths of the pictures that a data folder has links to."""
    folder = _placed(Path(source.path).expanduser(), base)
    if not folder.is_absolute() or not folder.is_dir():
        return set()
    try:
        return {os.path.realpath(path) for path in walk(folder).pictures if path.is_symlink()}
    except DataError as error:
        logger.warning("%s: links in it are not followed", error)
        return set()


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder; of a folder whose beginning is not known its own names decide."""
    if folder.is_absolute():
        return path.is_relative_to(os.path.realpath(folder))
    parts, above = Path(os.path.normpath(folder)).parts, path.parent.parts
    return any(above[start : start + len(parts)] == parts for start in range(len(above) - len(parts) + 1))


def _bar(report: Report) -> ProgressCount:
    return ProgressCount(lambda done, total, note: report(done, total, note))
