"""What a sweep found: the candidates in the order of the measure, and whether they differ at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from libreflux.printing import counted
from libreflux.probing.metrics.measures import Estimate, loss, resampled, slope
from libreflux.probing.metrics.paired import Paired, Score, compare, slope_error, total_loss
from libreflux.workflows.sweep_measure import Judged

SCORES: dict[str, Score] = {"loss": total_loss, "slope": slope_error}


@dataclass(frozen=True, eq=False)
class SweepRow:
    """One candidate.

    Attributes:
        name: as tables call it.
        kind, value: see `sweep_candidates.Candidate`.
        score, low, high: what the table is sorted by, the lower the better, and its own 95 % interval.
        to_last: score − that of the last checkpoint, and the ends of its interval; the intervals of all pairs hold
            together with 95 %.
        to_best: the same for the best.
        wins: share of the resamples of the pictures in which it is the best.
        loss, slope: by noise level.
        gap: how far averaging factors, not products, moved the adapter, relative to its norm.
        pictures: by guidance scale, then prompt, then seed.
    """

    name: str
    kind: str
    value: float
    score: float
    low: float
    high: float
    to_last: tuple[float, float, float]
    to_best: tuple[float, float, float]
    wins: float
    loss: Estimate
    slope: Estimate
    gap: float
    pictures: Sequence[Sequence[str]]

    @property
    def is_last(self) -> bool:
        """Whether it is the last checkpoint."""
        return self.kind == "last"

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        plain = {name: getattr(self, name) for name in ("name", "kind", "value", "score", "low", "high", "wins", "gap")}
        found: dict[str, Any] = plain | {"to_last": list(self.to_last), "to_best": list(self.to_best)}
        for name, one in (("loss", self.loss), ("slope", self.slope)):
            for suffix, values in (("", one.value), ("_low", one.low), ("_high", one.high)):
                found[f"{name}_by_sigma{suffix}"] = [each if math.isfinite(each) else None for each in values.tolist()]
        return found | {"pictures": [list(each) for each in self.pictures]}


@dataclass(frozen=True, eq=False)
class SweepTable:
    """All candidates.

    Attributes:
        rows: the best first.
        by: "loss" or "slope".
        sigmas: the noise levels.
        measured: how many pictures.
        order: index among the judged of each row.
        differ: how many pairs differ by more than the pictures' chance.
        sentence: whether they differ at all.
    """

    rows: tuple[SweepRow, ...]
    by: str
    sigmas: tuple[float, ...]
    measured: int
    order: tuple[int, ...]
    differ: int
    sentence: str

    @property
    def best(self) -> SweepRow:
        """The first row."""
        return self.rows[0]

    @property
    def last(self) -> SweepRow:
        """The last checkpoint's row."""
        return next(row for row in self.rows if row.is_last)


def table_of(judged: Sequence[Judged], by: str, seed: int) -> SweepTable:
    """Sorts the candidates, the last checkpoint being the first of `judged`, and tells whether they differ.

    Args:
        judged: two or more, on the same pictures.
        by: "loss" or "slope".
        seed: of the resampling.
    """
    every = [one.moments for one in judged]
    found = compare(every, SCORES[by], seed=seed)
    weights = resampled(len(every[0]), seed=seed)
    order = sorted(range(len(judged)), key=lambda index: (found.value[index], index))
    rows = tuple(
        SweepRow(
            name=judged[index].candidate.name,
            kind=judged[index].candidate.kind,
            value=judged[index].candidate.value,
            score=float(found.value[index]),
            low=float(found.low[index]),
            high=float(found.high[index]),
            to_last=_interval(found, index, 0),
            to_best=_interval(found, index, found.best),
            wins=float(found.wins[index]),
            loss=loss(every[index], weights),
            slope=slope(every[index], weights),
            gap=judged[index].gap,
            pictures=judged[index].pictures,
        )
        for index in order
    )
    differ = int(found.apart.sum()) // 2
    sentence = _sentence(rows, by, len(every[0]), differ)
    return SweepTable(rows, by, every[0].sigmas, len(every[0]), tuple(order), differ, sentence)


def _interval(found: Paired, index: int, other: int) -> tuple[float, float, float]:
    middle, reach = float(found.difference[index, other]), float(found.reach[index, other])
    return middle, middle - reach, middle + reach


def _sentence(rows: Sequence[SweepRow], by: str, pictures: int, differ: int) -> str:
    what = {"loss": "loss", "slope": "distance of the slope from 1"}[by]
    last, best = next(row for row in rows if row.is_last), rows[0]
    # Of a slope near 1 a share would be of almost nothing.
    scale, unit = (100 / last.score, " %") if by == "loss" and last.score > 0 else (1.0, "")
    spread = f"{scale * (rows[-1].score - best.score):.2g}{unit}"
    if not differ:
        return (
            f"They do not differ: on {counted(pictures, 'picture')} no two of {len(rows)} candidates are further apart"
            f" in {what} than chance; all lie within {spread}."
        )
    pairs = len(rows) * (len(rows) - 1) // 2
    alike = sum(row is not best and row.to_best[1] <= 0 for row in rows)
    others = f"{counted(alike, 'other')} cannot be told from it" if alike else "every other one is worse"
    begun = f"They differ, in {differ} of {counted(pairs, 'pair')} by more than chance, over {spread} of {what} in all"
    if best.is_last:
        return f"{begun}: the last checkpoint is the best, and {others}."
    if best.to_last[2] >= 0:
        return f"{begun}. None is better than the last checkpoint for certain; {best.name} has the best value."
    middle, low, high = (scale * -value for value in (best.to_last[0], best.to_last[2], best.to_last[1]))
    return (
        f"{begun}: {best.name} is better than the last checkpoint by {middle:.2g}{unit} ({low:.2g} to {high:.2g}), and"
        f" {others}."
    )
