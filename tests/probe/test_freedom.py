"""Freedom on replicates whose truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from libreflux.errors import DataError
from libreflux.probe.freedom import FreedomRow, freedom
from libreflux.probe.results import Measure, Result


def result(*measures: Measure, **settings: Any) -> Result:
    model = {"name": "m", "steps": 28}
    return Result(model=model, settings={"seed": 0, **settings}, versions={}, seconds=0.0, measures=list(measures))


def measure(value: float, spread: np.ndarray | float = 0.0, **changes: Any) -> Measure:
    replicates = value + np.broadcast_to(np.asarray(spread), (200,))
    given: dict[str, Any] = {"name": "loss", "at": {"sigma": 0.5}, "subset": "all", **changes}
    return Measure(value=value, low=0.0, high=0.0, replicates=replicates.tolist(), **given)


def only(rows: list[FreedomRow]) -> FreedomRow:
    (row,) = rows
    return row


def test_it_is_the_share_of_the_distance_that_is_closed() -> None:
    for freed, wanted, beyond in ((1.25, 0.75, False), (2.0, 0.0, False), (3.0, -1.0, False), (0.9, 0.9, True)):
        row = only(freedom(result(measure(freed)), result(measure(2.0)), result(measure(1.0))))
        assert row.freedom == pytest.approx(wanted) == row.low == row.high
        assert row.gap and row.beyond == beyond


def test_the_same_pictures_noise_cancels_and_own_noise_does_not() -> None:
    shared = np.random.default_rng(0).normal(0, 5, 200)  # far wider than the gap: only pairing sees through it
    row = only(freedom(result(measure(1.2, shared)), result(measure(2.0, shared)), result(measure(1.0, shared))))
    assert row.gap and row.low == pytest.approx(0.8) == row.high
    other = np.random.default_rng(1).normal(0, 5, 200)
    row = only(freedom(result(measure(1.2, shared)), result(measure(2.0, other)), result(measure(1.0, shared))))
    assert not row.gap and math.isnan(row.freedom)


def test_intervals_cover_the_truth() -> None:
    """95 % of the intervals hold the true share, here 0.7, when values scatter as their replicates say."""
    rng, held, rounds = np.random.default_rng(2), 0, 400
    for _ in range(rounds):
        drawn = []
        for truth in (1.3, 2.0, 1.0):
            value = truth + rng.normal(0, 0.05)
            drawn.append(result(measure(value, rng.normal(0, 0.05, 200))))
        row = only(freedom(*drawn))
        held += row.low <= 0.7 <= row.high
    assert 0.91 < held / rounds < 0.985


def test_sums_over_sigma_count_what_was_lost_elsewhere() -> None:
    def three(*values: float) -> Result:
        return result(*(measure(value, at={"sigma": i / 10, "text": "caption"}) for i, value in enumerate(values)))

    *each, total = freedom(three(1.1, 1.0, 1.3), three(2.0, 1.0, 3.0), three(1.0, 1.0, 1.0))
    assert [row.gap for row in each] == [True, False, True]
    assert dict(total.at) == {"text": "caption", "sigma": "all"}
    assert total.freedom == pytest.approx(1 - 0.4 / 3)
    worse = freedom(three(1.1, 2.0, 1.3), three(2.0, 1.0, 3.0), three(1.0, 1.0, 1.0))[-1]
    assert worse.freedom == pytest.approx(1 - 1.4 / 3)


def test_without_a_reference_only_theory_is_a_target() -> None:
    slope: dict[str, Any] = {"name": "slope", "reference": 1.0}
    freed = result(measure(0.99, **slope), measure(0.4))
    row = only(freedom(freed, result(measure(0.8, **slope), measure(0.7))))
    assert (row.name, row.target) == ("slope", 1.0) and row.freedom == pytest.approx(0.95)


def test_what_was_measured_otherwise_is_not_compared() -> None:
    with pytest.raises(DataError, match="pictures differs: 4 and 8"):
        freedom(result(measure(1.0), pictures=4), result(measure(2.0), pictures=8))
    own = {"own_guidance": 1.0, "rungs": [0.25]}
    assert freedom(result(measure(1.0)), result(measure(2.0), **own), result(measure(0.0)))
    assert not freedom(result(measure(1.0, at={"sigma": 0.1})), result(measure(2.0)), result(measure(0.0)))
