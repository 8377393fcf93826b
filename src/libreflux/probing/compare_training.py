"""The pictures that a model is measured on, compared with those that it was trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from libreflux.data.cache import Cache
from libreflux.data.crops import View, cut
from libreflux.data.pictures import load_rgb
from libreflux.errors import DataError
from libreflux.probing.judges import Judge
from libreflux.probing.nearest import Closest, cosine, mean_absolute, thumbnail
from libreflux.probing.nearest_latents import nearest_latents
from libreflux.probing.trained import IN_CACHE, Neighbour, PictureCheck, SetCheck, TrainingCheck
from libreflux.probing.training_pictures import (
    MeasuredPicture,
    NearestScene,
    SceneFinder,
    TrainingPicture,
    TrainingSet,
)

VERSION = 3
"""Raised when the same pictures come to be compared in another way, by a family's finder of scenes too."""
_AT_ONCE = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Known:
    """What is known of a model's training.

    Attributes:
        sets: pictures.
        unknown: adapters and runs of which nobody knows what they were trained on.
        find_scene: of a family that composes its pictures.
    """

    sets: Sequence[TrainingSet]
    unknown: Sequence[str] = ()
    find_scene: SceneFinder | None = None

    def __bool__(self) -> bool:
        return bool(self.sets or self.unknown or self.find_scene)

    @property
    def pictures(self) -> list[TrainingPicture]:
        """All pictures of all sets, each once: with a file if one of the sets has it, those trained on first."""
        found: dict[str, TrainingPicture] = {}
        for picture in (picture for one in self.sets for picture in one.pictures):
            known = found.setdefault(picture.id, picture)
            best = picture if known.path is None else known
            found[picture.id] = dataclasses.replace(best, trained=known.trained or picture.trained)
        return sorted(found.values(), key=lambda one: (not one.trained, one.id))


@dataclass(frozen=True, eq=False)
class Compared:
    """What was found, and where the nearest pictures are, to be shown.

    Attributes:
        check: the numbers.
        scenes: of each measured picture the scene nearest to its own; None where there is none.
        pictures: those that were trained on, by their ids.
    """

    check: TrainingCheck
    scenes: Sequence[NearestScene | None]
    pictures: Mapping[str, TrainingPicture]


def compare(
    measured: Sequence[MeasuredPicture],
    known: Known,
    *,
    view: View,
    judge: Judge | None,
    cache: Cache,
    progress: Progress = lambda done, total: None,
) -> Compared:
    """Looks for each measured picture among those that were trained on, and for the one that is nearest to it.

    Args:
        measured: the pictures.
        known: what was trained on.
        view: in which pictures are compared.
        judge: whose features say how near contents are; None: latents do, where both caches have them of one VAE.
        cache: of the measured pictures.
        progress: told how many training pictures of how many were looked at.
    """
    own = {one.id: one.path for one in measured}
    pictures = [dataclasses.replace(one, path=own.get(one.id, one.path)) for one in known.pictures]
    files, bar = _Files(measured, judge), _Bar(progress, len(pictures))
    for numbers, crops in _crops(pictures, view, bar.advance):
        files.offer(numbers, [pictures[number].trained for number in numbers], crops)
    wanted = {number for number in range(len(pictures)) if judge is None or number not in files.compared}
    left = {pictures[number].id for number in wanted}
    bar.expect(sum(each.id in left for one in known.sets if one.cache is not None for each in one.pictures))
    latents, damaged = nearest_latents(measured, pictures, wanted, known.sets, cache, view, bar.advance)
    content = latents if judge is None else files.features
    scenes = [None if known.find_scene is None else known.find_scene(one) for one in measured]
    trained = {one.id: one.trained for one in pictures}
    rows = []
    for row, (one, scene) in enumerate(zip(measured, scenes, strict=True)):
        same = {"file": trained.get(one.id), "pixels": files.crops.get(_digest(one.pixels))}
        if latents is not None and latents.distances[row] == 0:
            same["latents"] = pictures[int(latents.nearest[row])].trained
        same["scene"] = True if scene is not None and scene.seen else None
        pixels, near = (_near(found, row, pictures) for found in (files.pixels, content))
        shown = None if scene is None else Neighbour(name=scene.name, distance=float(scene.distance))
        rows.append(_checked(one, _seen(same), pixels, near, shown))
    compared = {pictures[number].id for number in files.compared}
    check = TrainingCheck(
        rows=rows,
        sets=[_set_check(one, compared, whole=one.whole and one.name not in damaged) for one in known.sets],
        scenes=known.find_scene is not None,
        content=("latents" if judge is None else "judge") if any(row.content for row in rows) else None,
        unknown=list(known.unknown),
    )
    return Compared(check, scenes, {one.id: one for one in pictures})


def _checked(
    one: MeasuredPicture, seen: str | None, pixels: Neighbour | None, content: Neighbour | None, scene: Neighbour | None
) -> PictureCheck:
    return PictureCheck(id=one.id, name=one.path.name, seen=seen, pixels=pixels, content=content, scene=scene)


def _seen(same: Mapping[str, bool | None]) -> str | None:
    """What was trained on; else whether it is in a cache. Of each: None is not there, False is in a cache alone."""
    found = {kind: trained for kind, trained in same.items() if trained is not None}
    return next((kind for kind, trained in found.items() if trained), IN_CACHE if found else None)


class _Bar:
    """Counts on, over several rounds."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def expect(self, more: int) -> None:
        """There is more to do than was known."""
        self._total += more

    def advance(self, by: int) -> None:
        """So many more are done."""
        self._done += by
        if by:
            self._progress(self._done, self._total)


class _Files:
    """Training pictures that have a file, as they pass by."""

    def __init__(self, measured: Sequence[MeasuredPicture], judge: Judge | None) -> None:
        self.pixels = Closest(np.stack([thumbnail(one.pixels) for one in measured]), mean_absolute)
        self.features = None
        if judge is not None:
            self.features = Closest(_features(judge, [one.pixels for one in measured]), cosine)
        self.crops: dict[str, bool] = {}
        self.compared: set[int] = set()
        self._judge = judge

    def offer(self, numbers: Sequence[int], trained: Sequence[bool], crops: Sequence[np.ndarray]) -> None:
        """Compares some of them."""
        for number, known, crop in zip(numbers, trained, crops, strict=True):
            self.pixels.offer(number, thumbnail(crop))
            name = _digest(crop)
            self.crops[name] = known or self.crops.get(name, False)
        self.compared.update(numbers)
        if self._judge is not None and self.features is not None and crops:
            for number, values in zip(numbers, _features(self._judge, crops), strict=True):
                self.features.offer(number, values)


def _near(found: Closest | None, row: int, pictures: Sequence[TrainingPicture]) -> Neighbour | None:
    if found is None or found.nearest[row] < 0:
        return None
    one = pictures[int(found.nearest[row])]
    name = one.id if one.path is None else one.path.name
    return Neighbour(name=name, distance=float(found.distances[row]), id=one.id)


def _set_check(one: TrainingSet, compared: Collection[str], *, whole: bool) -> SetCheck:
    there = sum(each.id in compared for each in one.pictures)
    trained = all(each.trained for each in one.pictures)
    return SetCheck(name=one.name, pictures=len(one.pictures), compared=there, trained=trained, whole=whole)


def _crops(
    pictures: Sequence[TrainingPicture], view: View, advance: Callable[[int], None]
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Numbers and crops of those that can be read, a few at once."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(pictures), _AT_ONCE):
            part = list(range(start, min(start + _AT_ONCE, len(pictures))))
            found = list(pool.map(lambda number: crop_of(pictures[number], view), part))
            kept = [(number, crop) for number, crop in zip(part, found, strict=True) if crop is not None]
            yield [number for number, _ in kept], [crop for _, crop in kept]
            advance(len(part))


def crop_of(picture: TrainingPicture, view: View) -> np.ndarray | None:
    """uint8 [H, W, 3]: the centred crop; None where no file of the picture can be read."""
    if picture.path is None:
        return None
    try:
        return cut(load_rgb(picture.path, picture.background), view, 0, picture.id)
    except (DataError, OSError):
        return None


def _digest(crop: np.ndarray) -> str:
    return hashlib.sha256(f"{crop.shape}".encode() + crop.tobytes()).hexdigest()


@torch.no_grad()
def _features(judge: Judge, crops: Sequence[np.ndarray]) -> np.ndarray:
    """[N, D] fp32."""
    found = []
    for start in range(0, len(crops), _AT_ONCE):
        stacked = torch.from_numpy(np.stack(crops[start : start + _AT_ONCE])).permute(0, 3, 1, 2)
        pixels = stacked.float() / 127.5 - 1
        found.append(judge(judge.prepare(pixels)).features.numpy())
    return np.concatenate(found)
