"""Freedom: how much of what distillation changed a training has undone, measure by measure, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from libreflux.errors import DataError
from libreflux.probe.measures import CONFIDENCE
from libreflux.probe.results import Measure, Result

OWN = ("own_guidance", "diversity_guidance", "rungs")
"""Settings that follow the model: they may differ, and what is measured at different places is not compared."""
AVERAGED = ("sigma",)
"""Coordinates that a row may sum distances over."""


@dataclass(frozen=True, kw_only=True)
class FreedomRow:
    """One measure of three models.

    Attributes:
        name, at, subset: of the measure; without "sigma" where the distances are summed over it.
        distilled, freed: their values; of sums, the mean distances from the target.
        target: the reference model's value, or theory's; None for sums.
        freedom: share of the distance that is closed: 1 all of it, 0 none, below 0 further away than before; NaN where
            there is no gap.
        low, high: ends of the 95 % interval over paired replicates; NaN where there is no gap.
        gap: whether the distilled model is clearly off the target: its interval leaves the target out.
        beyond: the freed model is clearly on the other side of the target.
        unit: of the values.
    """

    name: str
    at: tuple[tuple[str, str | float], ...]
    subset: str
    distilled: float
    freed: float
    target: float | None
    freedom: float
    low: float
    high: float
    gap: bool
    beyond: bool = False
    unit: str = ""


def freedom(freed: Result, distilled: Result, reference: Result | None = None) -> list[FreedomRow]:
    """1 - |m_freed - m_target| / |m_distilled - m_target| for every measure that all results have.

    m_target is the reference model's value; without one, what theory says of a free model (slope 1, padding 0), and
    only measures that have such a value are compared. Where a measure is at several sigmas, a row of the distances'
    sums follows.

    Raises:
        DataError: the results were measured with different settings.
    """
    for other in (distilled, reference):
        if other is not None:
            _require_like(freed, other)
    rows, groups = [], dict[tuple[object, ...], list[_Trio]]()
    for one in freed.measures:
        trio = _trio(one, distilled, reference)
        if trio is None:
            continue
        rows.append(trio.row())
        rest = {key: value for key, value in one.at.items() if key not in AVERAGED}
        if len(rest) < len(one.at):
            groups.setdefault((one.name, one.subset, *rest.items()), []).append(trio)
    return rows + [_summed(trios) for trios in groups.values() if len(trios) > 1]


@dataclass(frozen=True)
class _Trio:
    """One measure: [1 + R] arrays, the value and then its replicates, paired across the three."""

    of: Measure
    freed: np.ndarray
    distilled: np.ndarray
    target: np.ndarray

    @property
    def gap(self) -> bool:
        return _off_zero(self.distilled - self.target)

    def row(self) -> FreedomRow:
        away, before = np.abs(self.freed - self.target), np.abs(self.distilled - self.target)
        value, low, high = _share_closed(away, before) if self.gap else (math.nan,) * 3
        beyond = _off_zero(self.freed - self.target) and (
            (self.freed[0] - self.target[0]) * (self.distilled[0] - self.target[0]) < 0
        )
        return FreedomRow(
            name=self.of.name, at=tuple(self.of.at.items()), subset=self.of.subset,
            distilled=float(self.distilled[0]), freed=float(self.freed[0]), target=float(self.target[0]),
            freedom=value, low=low, high=high, gap=self.gap, beyond=bool(self.gap and beyond), unit=self.of.unit,
        )  # fmt: skip


def _summed(trios: Sequence[_Trio]) -> FreedomRow:
    """Distances of all sigmas together: where the distilled model is on target, what the freed one lost counts too."""
    away = np.mean([np.abs(trio.freed - trio.target) for trio in trios], axis=0)
    before = np.mean([np.abs(trio.distilled - trio.target) for trio in trios], axis=0)
    gap = any(trio.gap for trio in trios)
    value, low, high = _share_closed(away, before) if gap else (math.nan,) * 3
    of = trios[0].of
    at = tuple((key, value) for key, value in of.at.items() if key not in AVERAGED)
    return FreedomRow(
        name=of.name, at=(*at, ("sigma", "all")), subset=of.subset, distilled=float(before[0]), freed=float(away[0]),
        target=None, freedom=value, low=low, high=high, gap=gap, unit="mean distance",
    )  # fmt: skip


def _trio(one: Measure, distilled: Result, reference: Result | None) -> _Trio | None:
    at = dict(one.at)
    before = distilled.find(one.name, one.subset, **at)
    target = None if reference is None else reference.find(one.name, one.subset, **at)
    if before is None or (reference is not None and target is None):
        return None
    freed, old = _column(one), _column(before)
    if target is not None:
        aim = _column(target)
    elif one.reference is not None:
        aim = np.full_like(freed, one.reference)
    else:
        return None
    if not (len(freed) == len(old) == len(aim)):
        return None
    together = np.isfinite(freed) & np.isfinite(old) & np.isfinite(aim)
    if not together[0] or together.mean() < CONFIDENCE:
        return None
    return _Trio(one, freed[together], old[together], aim[together])


def _column(one: Measure) -> np.ndarray:
    return np.array([one.value, *one.replicates], np.float64)


def _off_zero(differences: np.ndarray) -> bool:
    """Whether the interval of [value, replicates…] leaves 0 out; a difference without any spread counts if not 0."""
    low, high = np.quantile(differences[1:], _TAILS)
    return bool(low > 0 or high < 0)


def _share_closed(away: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    shares = 1 - np.divide(away, before, out=np.full_like(away, np.nan), where=before > 0)
    low, high = np.nanquantile(shares[1:], _TAILS)
    return float(shares[0]), float(low), float(high)


_TAILS = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]


def _require_like(one: Result, other: Result) -> None:
    for key in sorted(set(one.settings) | set(other.settings)):
        if key not in OWN and one.settings.get(key) != other.settings.get(key):
            told = f"{key} differs: {_brief(one.settings.get(key))} and {_brief(other.settings.get(key))}"
            where = f"{one.model['name']} and {other.model['name']}"
            raise DataError(told, where=where, mend="probe both with the same options")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
