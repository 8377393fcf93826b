"""Several trainings that differ in their seed alone, as one result whose intervals are over seeds and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from libreflux import seeding
from libreflux.errors import DataError
from libreflux.probing.metrics.measures import CONFIDENCE
from libreflux.probing.results import Measure, Result


def over_seeds(results: Sequence[Result], *, seed: int = 0) -> Result:
    """The mean of each measure over K trainings, its replicates resampling the trainings and the pictures.

    A replicate is the mean over the trainings of theirs, which are paired over pictures, plus how far a resample of the
    trainings moves the mean. That is widened by √(K / (K − 1)): a bootstrap of K values knows a spread that is too
    small by so much (Efron & Tibshirani 1993, sect. 5.3), which matters for three.

    Args:
        results: one of each training, measured alike; measures that not all have are left out.
        seed: of the resampling; the same for every measure, so that they stay paired.

    Raises:
        DataError: replicates of several lengths.
    """
    if len(results) == 1:
        return results[0]
    tables = [{_place(row): row for row in one.measures} for one in results]
    shared = [row for row in results[0].measures if all(_place(row) in table for table in tables)]
    rows = [_mean([table[_place(row)] for table in tables], seed) for row in shared]
    name = f"{results[0].model['name']}, {len(results)} trainings"
    return dataclasses.replace(results[0], model={**results[0].model, "name": name}, measures=rows, pictures=[])


def spread_over_seeds(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """[R]: how far a resample of K trainings moves the mean of their values, R replicates of [K, 1 + R] values."""
    count, replicates = len(values), values.shape[1] - 1
    drawn = seeding.rng(seed, "trainings", count, replicates).integers(count, size=(replicates, count))
    moved: np.ndarray = values[:, 0][drawn].mean(axis=1) - values[:, 0].mean()
    return moved * (count / (count - 1)) ** 0.5


def _mean(rows: Sequence[Measure], seed: int) -> Measure:
    if len({len(row.replicates) for row in rows}) > 1:
        raise DataError("replicates are not paired", where=rows[0].name, hint="probe the models again, all alike")
    values = np.array([[row.value, *row.replicates] for row in rows])
    replicates = values[:, 1:].mean(axis=0) + spread_over_seeds(values, seed=seed)
    finite = replicates[np.isfinite(replicates)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (np.nan, np.nan)
    return dataclasses.replace(
        rows[0],
        value=float(values[:, 0].mean()),
        low=float(low),
        high=float(high),
        replicates=replicates.tolist(),
        units=None,
    )


def _place(row: Measure) -> tuple[object, ...]:
    return row.name, tuple(sorted(row.at.items())), row.subset
