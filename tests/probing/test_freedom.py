"""Freedom against a known truth: its value, its interval's coverage, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from libreflux import seeding
from libreflux.cli.tables import print_freedom
from libreflux.errors import DataError
from libreflux.probing.freedom import FreedomRow, closed, freedom
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.metrics.measures import resampled
from libreflux.probing.results import Coordinate, Measure, Result

UNITS = 80
WEIGHTS = np.vstack([np.full((1, UNITS), 1 / UNITS), resampled(UNITS, replicates=200)])
SETTINGS = {"seed": 0, "pictures": UNITS, "own_guidance": 3.0, "rungs": [], "seen": None}


def sides(trial: int, left: np.ndarray, gap: np.ndarray) -> list[np.ndarray]:
    """Freed, distilled and reference, [K, 1 + R], of pictures whose difficulty all three share."""
    random = seeding.rng(trial, "freedom")
    shared = random.standard_normal((len(gap), UNITS))
    means = (left, gap, np.zeros_like(gap))
    units = [shared + m[:, None] + 0.5 * random.standard_normal(shared.shape) for m in means]
    return [side @ WEIGHTS.T for side in units]


@pytest.mark.parametrize("places", [1, 6])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0, 1.3], ids="share={}".format)
def test_the_interval_covers_the_true_share(share: float, places: int) -> None:
    gap = np.linspace(0.8, 1.6, places)
    truth = 1 - abs(1 - share)
    found = [closed(*sides(trial, (1 - share) * gap, gap)) for trial in range(200)]
    assert all(one is not None for one in found)
    kept = [one for one in found if one is not None]
    assert np.mean([low <= truth <= high for _, low, high, *_ in kept]) >= 0.9
    assert np.median([high - low for _, low, high, *_ in kept]) < 0.5  # covers, and not by saying nothing
    assert np.median([value for value, *_ in kept]) == pytest.approx(truth, abs=0.12)
    told_beyond = np.mean([beyond for _, _, _, beyond, _ in kept])
    assert told_beyond > 0.8 if share > 1 else told_beyond < 0.1


def test_no_gap_is_said_where_there_is_none_whatever_the_number_of_sigmas() -> None:
    for places in (1, 8):
        none = np.zeros(places)
        assert np.mean([closed(*sides(trial, none, none)) is None for trial in range(200)]) >= 0.9
    rounding = np.full((1, 201), 4e-7)
    assert closed(rounding, rounding, np.zeros((1, 201))) is None


def rows_of(name: str, at: dict[str, Coordinate], level: float, spread: float = 1.0, **more: Any) -> list[Measure]:
    values = level + spread * seeding.rng(0, "units").standard_normal(UNITS)
    return measured(name, at, mean(values), UNITS, {"all": np.arange(UNITS)}, seed=0, **more)


def model(name: str, excess: float, settings: dict[str, Any] | None = None, guidance: float = 3.0) -> Result:
    rows = []
    for sigma in (0.25, 0.5, 1.0):
        rows += rows_of("loss", {"sigma": sigma, "text": "caption"}, 0.5 + excess * sigma)
        rows += rows_of("slope", {"sigma": sigma, "text": "caption"}, 1 - excess * sigma, 1e-3, reference=1.0)
    rows += rows_of("accuracy", {"guidance": 4.0, "what": "all"}, 0.9 - excess)
    rows += rows_of("accuracy", {"steps": 4, "guidance": guidance, "what": "all"}, 0.5 + excess / 2)
    rows += rows_of("padding", {"padding": "drop", "tokens": 20}, excess, 1e-3, reference=0.0)
    rows += rows_of("judge_ceiling", {"what": "all"}, 0.99)
    settings = {**SETTINGS, "own_guidance": guidance, **(settings or {})}
    return Result(model={"name": name}, settings=settings, versions={}, seconds=1, measures=rows)


def table(rows: list[FreedomRow]) -> dict[tuple[str, str], FreedomRow]:
    return {(row.name, "/".join(str(value) for value in row.at.values())): row for row in rows}


def test_paired_models_give_exact_shares_by_measure_and_over_sigma() -> None:
    distilled, freed, base = model("d", 0.4, {"rungs": [0.25, 1.0]}, 1.0), model("f", 0.1), model("b", 0.0)
    found = table(freedom(freed, distilled, base))
    assert ("judge_ceiling", "all") not in found
    for key in [
        ("loss", "0.25/caption"),
        ("slope", "all/caption"),
        ("accuracy", "4.0/all"),
        ("accuracy", "own/4/all"),
    ]:
        row = found[key]
        assert (row.share, row.low, row.high) == pytest.approx((0.75,) * 3, abs=0.02), key
        assert row.verdict == "gap"
        assert not row.beyond
    assert found["loss", "off ladder/caption"].distilled == pytest.approx(found["loss", "0.5/caption"].distilled)
    assert found["loss", "0.25/caption"].text == "75 % [75, 75]"
    assert table(freedom(model("f", -0.1), distilled, base))["loss", "all/caption"].beyond
    assert {row.verdict for row in freedom(freed, base, base)} == {"no gap"}
    assert table(freedom(model("f", 0.6), distilled, base))["slope", "all/caption"].share == pytest.approx(
        -0.5, abs=0.02
    )


def test_without_a_reference_theory_is_one() -> None:
    found = table(freedom(model("f", 0.1), model("d", 0.4)))
    assert {name for name, _ in found} == {"slope", "padding"}
    assert found["padding", "drop/20"].share == pytest.approx(0.75, abs=0.02)
    assert found["padding", "drop/20"].reference == 0


def test_what_is_not_finite_is_unknown_and_the_table_says_all() -> None:
    freed, distilled, base = model("f", 0.1), model("d", 0.4), model("b", 0.0)
    freed.measures[0] = dataclasses.replace(freed.measures[0], value=math.nan)
    rows = freedom(freed, distilled, base)
    assert table(rows)["loss", "0.25/caption"].text == "unknown" == table(rows)["loss", "all/caption"].text
    assert json.loads(json.dumps([row.as_json() for row in rows], allow_nan=False))
    told = io.StringIO()
    print_freedom([*rows, *freedom(base, base, base)], "emoji", Console(file=told))
    for word in ("75 % [75, 75]", "no gap", "unknown", "guidance own"):
        assert word in told.getvalue()


@pytest.mark.parametrize(
    ("changed", "key"), [({"pictures": 3}, "pictures"), ({"judge": "x"}, "judge"), ({"seen": ["fox"]}, None)]
)
def test_results_that_were_not_measured_alike_are_refused(changed: dict[str, Any], key: str | None) -> None:
    other = model("other", 0.4, changed)
    if key is None:  # one says what it has seen, the other cannot
        assert freedom(model("f", 0.1), other, model("b", 0.0))
        with pytest.raises(DataError, match="seen"):
            freedom(model("f", 0.1, {"seen": ["dog"]}), other)
        return
    with pytest.raises(DataError, match=f"^f and other: were measured with another {key} .*hint"):
        freedom(model("f", 0.1), other)
    with pytest.raises(DataError, match=key):
        freedom(model("f", 0.1), model("d", 0.4), other)


def test_replicates_that_cannot_be_pairs_are_refused() -> None:
    freed, distilled = model("f", 0.1), model("d", 0.4)
    freed.measures[1] = dataclasses.replace(freed.measures[1], replicates=[1.0])
    with pytest.raises(DataError, match="not paired"):
        freedom(freed, distilled)
