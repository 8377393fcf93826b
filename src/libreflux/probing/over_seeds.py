"""Several trainings that differ in their seed alone, as one result whose intervals are over seeds and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from libreflux import seeding
from libreflux.errors import DataError
from libreflux.probing.freedom import check_comparable
from libreflux.probing.metrics.bootstrap import ends
from libreflux.probing.results import Measure, Result


def over_seeds(results: Sequence[Result], *, seed: int = 0) -> Result:
    """The mean of each measure over K trainings, its replicates over the trainings and the pictures.

    A replicate is the mean over the trainings of theirs, which are paired over pictures, plus how far other trainings
    could move the mean, see `spread_over_seeds`. A share of yes and no has an interval that replicates do not tell
    (Wilson's): the mean of the trainings' own ends is within the result.

    Args:
        results: one of each training, measured alike; measures that not all have are left out.
        seed: of the replicates.

    Raises:
        DataError: replicates of several lengths, or results that were not measured alike.
    """
    if len(results) == 1:
        return results[0]
    check_comparable(results)
    tables = [{_place(row): row for row in one.measures} for one in results]
    shared = [row for row in results[0].measures if all(_place(row) in table for table in tables)]
    rows = [_mean([table[_place(row)] for table in tables], seed) for row in shared]
    name = f"{results[0].model['name']}, {len(results)} trainings"
    return dataclasses.replace(results[0], model={**results[0].model, "name": name}, measures=rows, pictures=[])


def spread_over_seeds(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """[R]: how far other trainings could move the mean of K trainings' values, R replicates of [K, 1 + R] values.

    s / √K times Student's t of K − 1 degrees (Student 1908, Biometrika 6, p. 1), as Σ z_k (x_k − x̄) / √(K (K − 1)) over
    √(χ² / (K − 1)) with normal z_k: of normal trainings its 95 % interval holds in 95 of 100 cases. A bootstrap
    of three values holds in 82, even with its spread made right. The z_k and χ² are the same for every measure, so
    that they stay paired.
    """
    count, replicates = len(values), values.shape[1] - 1
    random = seeding.rng(seed, "trainings", count, replicates)
    normal, square = random.standard_normal((replicates, count)), random.chisquare(count - 1, replicates)
    found: np.ndarray = normal @ (values[:, 0] - values[:, 0].mean()) / np.sqrt(count * square)
    return found


def _mean(rows: Sequence[Measure], seed: int) -> Measure:
    if len({len(row.replicates) for row in rows}) > 1:
        raise DataError("replicates are not paired", where=rows[0].name, hint="probe the models again, all alike")
    values = np.array([[row.value, *row.replicates] for row in rows])
    replicates = values[:, 1:].mean(axis=0) + spread_over_seeds(values, seed=seed)
    low, high = ends(replicates)
    if not all(_of_replicates(row) for row in rows):  # a share, whose interval is Wilson's
        low = max(0.0, min(low, float(np.mean([row.low for row in rows]))))
        high = min(1.0, max(high, float(np.mean([row.high for row in rows]))))
    return dataclasses.replace(
        rows[0],
        value=float(values[:, 0].mean()),
        low=low,
        high=high,
        replicates=replicates.tolist(),
        units=None,
    )


def _of_replicates(row: Measure) -> bool:
    return np.allclose((row.low, row.high), ends(np.array(row.replicates)), equal_nan=True)


def _place(row: Measure) -> tuple[object, ...]:
    return row.name, tuple(sorted(row.at.items())), row.subset
