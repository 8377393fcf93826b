"""The training pictures whose latents, as caches hold them, are nearest to those of the measured pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from libreflux.data.cache import Cache
from libreflux.data.crops import View
from libreflux.data.index import latents_key
from libreflux.errors import DataError
from libreflux.printing import get_logger
from libreflux.probing.nearest import Closest, root_mean_square
from libreflux.probing.training_pictures import MeasuredPicture, TrainingPicture, TrainingSet

logger = get_logger(__name__)

_AT_ONCE = 64
_COLUMNS = 16384


def nearest_latents(
    measured: Sequence[MeasuredPicture],
    pictures: Sequence[TrainingPicture],
    wanted: Collection[int],
    sets: Sequence[TrainingSet],
    cache: Cache,
    view: View,
    progress: Callable[[int], None],
) -> tuple[Closest | None, set[str]]:
    """Compares latents of the same crop, where a set's cache is of the same VAE.

    Args:
        measured: the pictures.
        pictures: of all sets.
        wanted: the numbers of those that are compared.
        sets: whose caches are read.
        cache: of the measured pictures.
        view: the crop.
        progress: told of how many more pictures were looked at.

    Returns:
        The nearest, None where no cache is of the same VAE; and the names of the sets that are damaged, with a warning
        for each.
    """
    closest: Closest | None = None
    own, damaged = np.zeros((0, 0), np.float32), set[str]()
    for one in sets:
        if one.cache is None:
            continue
        here = {each.id for each in one.pictures}
        left = [number for number in sorted(wanted) if pictures[number].id in here]
        if (trained := _opened(one, damaged)) is None or trained.settings.get("vae") != cache.settings.get("vae"):
            progress(len(left))
            continue
        if closest is None:
            own = np.stack([_flat(cache, each.id, view.name(0, "white")) for each in measured])
            closest = Closest(own, root_mean_square)
        for start in range(0, len(left), _AT_ONCE):
            part = left[start : start + _AT_ONCE]
            numbers, block = _read(one, trained, [(number, pictures[number]) for number in part], view, damaged)
            if numbers:
                _offer(closest, own, numbers, np.stack(block))
            progress(len(part))
    return closest, damaged


def crops_there(one: TrainingSet, view: View) -> list[object] | None:
    """What decides what `nearest_latents` finds in a set: its cache's VAE, and which crops it has; None without any."""
    cache = _opened(one, set())
    if cache is None:
        return None
    keys = [latents_key(each.id, view.name(0, each.background)) for each in one.pictures]
    return [cache.settings.get("vae"), (cache.sizes(keys)[:, 0] >= 0).tolist() if keys else []]


def _opened(one: TrainingSet, damaged: set[str]) -> Cache | None:
    if one.cache is None:
        return None
    try:
        return Cache(one.cache, partial=True)
    except DataError as error:
        _tell(one, error, damaged)
        return None


def _read(
    one: TrainingSet, cache: Cache, part: Sequence[tuple[int, TrainingPicture]], view: View, damaged: set[str]
) -> tuple[list[int], list[np.ndarray]]:
    """Numbers and latents of those that the cache holds whole."""
    numbers, block = list[int](), list[np.ndarray]()
    names = [view.name(0, picture.background) for _, picture in part]
    keys = [latents_key(picture.id, name) for (_, picture), name in zip(part, names, strict=True)]
    there = cache.sizes(keys)[:, 0] >= 0
    for (number, picture), name, is_there in zip(part, names, there.tolist(), strict=True):
        if not is_there:
            continue
        try:
            block.append(_flat(cache, picture.id, name))
        except DataError as error:
            _tell(one, error, damaged)
            continue
        numbers.append(number)
    return numbers, block


def _tell(one: TrainingSet, error: DataError, damaged: set[str]) -> None:
    if one.name not in damaged:
        logger.warning("%s; what cannot be read of it is not compared", error)
    damaged.add(one.name)


def _offer(closest: Closest, own: np.ndarray, numbers: Sequence[int], block: np.ndarray) -> None:
    """Of each measured picture the nearest of a block, by |m|² - 2 m·t + |t|² in fp64; its distance is then exact."""
    squares = np.zeros((len(own), len(block)))
    for start in range(0, own.shape[1], _COLUMNS):
        ours, theirs = (values[:, start : start + _COLUMNS].astype(np.float64) for values in (own, block))
        squares += np.square(ours).sum(1)[:, None] - 2 * ours @ theirs.T + np.square(theirs).sum(1)
    for row, best in enumerate(np.nan_to_num(squares, nan=np.inf).argmin(1).tolist()):
        distance = float(root_mean_square(own[row : row + 1], block[best])[0])
        closest.take(row, numbers[best], distance)


def _flat(cache: Cache, name: str, crop: str) -> np.ndarray:
    """[D] fp32."""
    found: np.ndarray = cache.latents(name, crop).numpy().astype(np.float32).reshape(-1)
    return found
