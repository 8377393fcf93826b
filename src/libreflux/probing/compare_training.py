"""The pictures that a model is measured on, compared with those that it was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from libreflux.data.cache import Cache
from libreflux.data.crops import View, cut
from libreflux.data.index import latents_key
from libreflux.data.pictures import load_rgb
from libreflux.errors import DataError
from libreflux.probing.judges import Judge
from libreflux.probing.nearest import Closest, cosine, mean_absolute, root_mean_square, thumbnail
from libreflux.probing.trained import Neighbour, PictureCheck, SetCheck, TrainingCheck
from libreflux.probing.training_pictures import (
    MeasuredPicture,
    NearestScene,
    SceneFinder,
    TrainingPicture,
    TrainingSet,
)

VERSION = 1
"""Raised when the same pictures come to be compared in another way."""
_AT_ONCE = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Known:
    """What is known of a model's training.

    Attributes:
        sets: pictures.
        unknown: adapters of which nobody knows what they were trained on.
        find_scene: of a family that composes its pictures.
    """

    sets: Sequence[TrainingSet]
    unknown: Sequence[str] = ()
    find_scene: SceneFinder | None = None

    def __bool__(self) -> bool:
        return bool(self.sets or self.unknown or self.find_scene)

    @property
    def pictures(self) -> list[TrainingPicture]:
        """All pictures of all sets by id, each once; with a file, if one of the sets has it."""
        found: dict[str, TrainingPicture] = {}
        for picture in (picture for one in self.sets for picture in one.pictures):
            if picture.id not in found or found[picture.id].path is None:
                found[picture.id] = picture
        return [picture for _, picture in sorted(found.items())]


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
    pictures = [TrainingPicture(one.id, own.get(one.id, one.path), one.background) for one in known.pictures]
    files = _Files(measured, judge)
    for numbers, crops in _crops(pictures, view, progress):
        files.offer(numbers, crops)
    content = files.features if judge is not None else _by_latents(measured, pictures, known, cache, view)
    scenes = [None if known.find_scene is None else known.find_scene(one) for one in measured]
    trained = {one.id for one in pictures}
    rows = []
    for row, (one, scene) in enumerate(zip(measured, scenes, strict=True)):
        same = "file" if one.id in trained else "pixels" if _digest(one.pixels) in files.crops else None
        checked = PictureCheck(
            id=one.id,
            name=one.path.name,
            seen=same or ("scene" if scene is not None and scene.seen else None),
            pixels=_near(files.pixels, row, pictures),
            content=_near(content, row, pictures),
            scene=None if scene is None else Neighbour(name=scene.name, distance=float(scene.distance)),
        )
        rows.append(checked)
    compared = {pictures[number].id for number in files.compared}
    check = TrainingCheck(
        rows=rows,
        sets=[_set_check(one, compared) for one in known.sets],
        scenes=known.find_scene is not None,
        content=("latents" if judge is None else "judge") if any(row.content for row in rows) else None,
        unknown=list(known.unknown),
    )
    return Compared(check, scenes, {one.id: one for one in pictures})


class _Files:
    """Training pictures that have a file, as they pass by."""

    def __init__(self, measured: Sequence[MeasuredPicture], judge: Judge | None) -> None:
        self.pixels = Closest(np.stack([thumbnail(one.pixels) for one in measured]), mean_absolute)
        self.features = None
        if judge is not None:
            self.features = Closest(_features(judge, [one.pixels for one in measured]), cosine)
        self.crops: set[str] = set()
        self.compared: set[int] = set()
        self._judge = judge

    def offer(self, numbers: Sequence[int], crops: Sequence[np.ndarray]) -> None:
        """Compares some of them."""
        for number, crop in zip(numbers, crops, strict=True):
            self.pixels.offer(number, thumbnail(crop))
            self.crops.add(_digest(crop))
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


def _set_check(one: TrainingSet, compared: Collection[str]) -> SetCheck:
    there = sum(each.id in compared for each in one.pictures)
    return SetCheck(name=one.name, pictures=len(one.pictures), compared=there)


def _crops(
    pictures: Sequence[TrainingPicture], view: View, progress: Progress
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Numbers and crops of those that can be read, a few at once."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(pictures), _AT_ONCE):
            part = list(range(start, min(start + _AT_ONCE, len(pictures))))
            found = list(pool.map(lambda number: crop_of(pictures[number], view), part))
            kept = [(number, crop) for number, crop in zip(part, found, strict=True) if crop is not None]
            yield [number for number, _ in kept], [crop for _, crop in kept]
            progress(part[-1] + 1, len(pictures))


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
        if pixels.shape[-2:] != (judge.side, judge.side):
            pixels = torch.nn.functional.interpolate(pixels, (judge.side, judge.side), mode="bilinear", antialias=True)
        found.append(judge(pixels).features.numpy())
    return np.concatenate(found)


def _by_latents(
    measured: Sequence[MeasuredPicture], pictures: Sequence[TrainingPicture], known: Known, cache: Cache, view: View
) -> Closest | None:
    """By the latents of the same crop in the caches of the sets; None where no cache is of the same VAE."""
    name = view.name(0, "white")
    closest: Closest | None = None
    for one in known.sets:
        if one.cache is None:
            continue
        trained = Cache(one.cache, partial=True)
        if trained.settings.get("vae") != cache.settings.get("vae"):
            continue
        closest = closest or Closest(_flat(cache, [each.id for each in measured], name), root_mean_square)
        here = {each.id for each in one.pictures}
        for number, each in enumerate(pictures):
            crop = view.name(0, each.background)
            if each.id in here and trained.sizes([latents_key(each.id, crop)])[0, 0] >= 0:
                closest.offer(number, _flat(trained, [each.id], crop)[0])
    return closest


def _flat(cache: Cache, ids: Sequence[str], crop: str) -> np.ndarray:
    """[N, D] fp32."""
    return np.stack([cache.latents(each, crop).numpy().astype(np.float32).reshape(-1) for each in ids])
