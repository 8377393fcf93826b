"""Freedom: the share of the distance from a distilled model to a reference that a freed model has closed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from libreflux.errors import DataError
from libreflux.probing.metrics.measures import CONFIDENCE
from libreflux.probing.results import Coordinate, Measure, Result

BY_MODEL = ("own_guidance", "diversity_guidance", "rungs")
"""Settings that follow from the model; all others must be alike."""
OF_THE_DATA = ("judge_ceiling", "agreement_cut")
"""Measures that are the same for every model, beside those of held-out pictures."""
OVER_SIGMA = ("loss", "slope")
ROUNDING = 1e-5
"""Differences as small as this are fp32's, not the model's: padding that is masked leaves about 4e-7."""
NOISY = 2.0
"""An interval of a share that is wider and has 0 within tells nothing: the gap may be closed or have grown."""
TOO_NOISY = "gap too noisy"
Place = tuple[str, tuple[tuple[str, Coordinate], ...], str]


@dataclass(frozen=True, kw_only=True)
class FreedomRow:
    """How much of the distance is closed by one measure.

    Attributes:
        name, at, subset, unit: of the measure; at["sigma"] is "all", "on ladder" or "off ladder" for a mean over sigma.
        distilled, freed, reference: its three values.
        share: 1 all of the distance, 0 none, below 0 the distance has grown; NaN where there is no gap.
        low, high: ends of the share's 95 % interval.
        verdict: "gap"; `TOO_NOISY` where the interval tells nothing; "no gap" where the distance is not clearly off
            zero; "unknown" where a number is not finite.
        beyond: the freed model is clearly on the reference's other side (for a mean: at most sigmas).
        high_replicates: the upper end by the replicates alone; `high` is above it where the freed model is not clearly
            off the reference and counts as arrived.
        count: pictures or prompts that it is counted over, None where that is not known.
    """

    name: str
    at: Mapping[str, Coordinate]
    subset: str
    unit: str
    distilled: float
    freed: float
    reference: float
    share: float
    low: float
    high: float
    verdict: str
    beyond: bool
    high_replicates: float = math.nan
    count: int | None = None

    @property
    def snapped(self) -> bool:
        """Whether `high` is above what the replicates say."""
        return self.high > self.high_replicates

    @property
    def text(self) -> str:
        """What a table says: "82 % [75, 88]", "no gap", "gap too noisy" or "unknown"; a star where `snapped`."""
        if self.verdict != "gap":
            return self.verdict
        beyond, star = ", beyond" if self.beyond else "", "*" if self.snapped else ""
        share, low, high = (round(100 * one) for one in (self.share, self.low, self.high))  # and never "-0"
        return f"{share} % [{low}, {high}{star}]{beyond}"

    @property
    def brief(self) -> str:
        """The same without its interval: "82 %"."""
        return f"{round(100 * self.share)} %" if self.verdict == "gap" else self.verdict

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        rows = {**self.__dict__, "at": dict(self.at), "snapped": self.snapped}
        return {key: None if isinstance(row, float) and not math.isfinite(row) else row for key, row in rows.items()}


def freedom(freed: Result, distilled: Result, reference: Result | None = None) -> list[FreedomRow]:
    """Freedom by every measure that all of these results have, and its means over sigma for loss and slope.

    Args:
        freed: the model in question.
        distilled: what it was made from.
        reference: a free model; None compares with what theory says, where it says something.

    Raises:
        DataError: results that were not measured alike.
    """
    check_comparable([freed, distilled, *([] if reference is None else [reference])])
    tables = [_by_place(one) for one in (freed, distilled)]
    third = None if reference is None else _by_place(reference)
    triples: dict[Place, _Triple] = {}
    for place, one in tables[0].items():
        other, target = tables[1].get(place), one.reference if third is None else third.get(place)
        if not _of_the_data(one.name) and other is not None and target is not None:
            triples[place] = _Triple.of(place, one, other, target)
    rungs = distilled.settings.get("rungs") or ()
    rows = list[FreedomRow]()
    for name in dict.fromkeys(triple.name for triple in triples.values()):
        here = [triple for triple in triples.values() if triple.name == name]
        rows += [_row(group, at) for group, at in (_means(here, rungs) if name in OVER_SIGMA else ())]
        rows += [_row([triple], triple.at) for triple in here]
    return rows


def _of_the_data(name: str) -> bool:
    return name in OF_THE_DATA or name.startswith("held_out_")


def check_comparable(results: Sequence[Result]) -> None:
    """Raises DataError, naming the setting, unless all results were measured alike.

    Which subjects a model has seen may be unknown to some of them: then they share the subset "all" alone.
    """
    first = results[0]
    for other in results[1:]:
        for key in dict.fromkeys([*first.settings, *other.settings]):
            a, b = first.settings.get(key), other.settings.get(key)
            unknown = key == "seen" and (a is None or b is None)
            if a != b and key not in BY_MODEL and not unknown:
                told = "" if key == "seen" else f" ({_short(a)} and {_short(b)})"
                names = f"{first.model['name']} and {other.model['name']}"
                hint = f"probe both again with the same {key}"
                raise DataError(f"were measured with another {key}{told}", where=names, hint=hint)


class Closed(NamedTuple):
    """A share with the ends of its interval, see `FreedomRow`."""

    share: float
    low: float
    high: float
    beyond: bool
    high_replicates: float


def closed(freed: np.ndarray, distilled: np.ndarray, reference: np.ndarray) -> Closed | None:
    """1 − mean|freed − reference| / mean|distilled − reference| over K places.

    Low is a quantile of the share over paired replicates. For high, a place where the freed model is not clearly off
    the reference counts as closed: |·| of noise around 0 is never 0, and would keep 1 out of every interval.

    Args:
        freed, distilled, reference: [K, 1 + R], the value and then its replicates, paired.

    Returns:
        None where the distance from distilled to reference is not clearly off zero at any place (each at a confidence
        that allows for K of them).
    """
    places = len(freed)
    gap, left = distilled - reference, freed - reference
    clear = _off_zero(gap) & (np.abs(gap[:, 0]) > ROUNDING)
    if not clear.any():
        return None
    apart, total = _off_zero(left), np.abs(gap).mean(axis=0)
    share = _one_less(np.abs(left).mean(axis=0), total)
    favoured = _one_less(np.abs(np.where(apart[:, None], left, 0.0)).mean(axis=0), total)
    tail = (1 - CONFIDENCE) / 2
    low, plain = np.quantile(share[1:], [tail, 1 - tail])
    high = np.quantile(favoured[1:], 1 - tail)
    beyond = clear & apart & (np.sign(left[:, 0]) == -np.sign(gap[:, 0]))
    return Closed(
        share=float(share[0]),
        low=float(min(low, share[0])),
        high=float(max(high, plain, share[0])),
        beyond=bool(2 * beyond.sum() > places),
        high_replicates=float(max(plain, share[0])),
    )


def _one_less(left: np.ndarray, total: np.ndarray) -> np.ndarray:
    return 1 - left / np.maximum(total, np.finfo(np.float64).tiny)


def _off_zero(differences: np.ndarray) -> np.ndarray:
    """[K] whether each interval over [K, 1 + R] differences leaves out 0, at a confidence that allows for K of them."""
    tail, places = (1 - CONFIDENCE) / 2, len(differences)
    low, high = np.quantile(differences[:, 1:], [tail, 1 - tail], axis=1)
    found: np.ndarray = (low > 0) | (high < 0)
    # Two hundred replicates do not reach the tails that Bonferroni asks for: a normal law does.
    deviations = np.abs(differences[:, 0]) > NormalDist().inv_cdf(1 - tail / places) * differences[:, 1:].std(axis=1)
    return found if places == 1 else found & deviations


@dataclass(frozen=True, eq=False)
class _Triple:
    """One measure of three models, each as its value and then its replicates."""

    name: str
    at: Mapping[str, Coordinate]
    subset: str
    unit: str
    count: int | None
    freed: np.ndarray
    distilled: np.ndarray
    reference: np.ndarray

    @staticmethod
    def of(place: Place, freed: Measure, distilled: Measure, target: Measure | float) -> _Triple:
        sides = [np.array([one.value, *one.replicates]) for one in (freed, distilled)]
        if isinstance(target, Measure):
            sides.append(np.array([target.value, *target.replicates]))
        else:
            sides.append(np.full_like(sides[0], target))
        if len({len(side) for side in sides}) > 1:
            raise DataError("replicates are not paired", where=freed.name, hint="probe the models again, all alike")
        known = [one.count for one in (freed, distilled, target) if isinstance(one, Measure) and one.count is not None]
        return _Triple(freed.name, dict(place[1]), freed.subset, freed.unit, min(known, default=None), *sides)


def _by_place(result: Result) -> dict[Place, Measure]:
    """A measure at the model's default guidance has "own" in the guidance's place."""
    found = {}
    for one in result.measures:
        at = dict(one.at)
        if "steps" in at and "guidance" in at and at["guidance"] == result.settings.get("own_guidance"):
            at["guidance"] = "own"
        found[one.name, tuple(sorted(at.items())), one.subset] = one
    return found


def _means(
    triples: Sequence[_Triple], rungs: Sequence[float]
) -> Iterator[tuple[list[_Triple], Mapping[str, Coordinate]]]:
    """Measures to average over sigma: all, and those on and off a few-step student's own ladder."""
    kept = [triple for triple in triples if "sigma" in triple.at]
    for text, subset in dict.fromkeys((triple.at.get("text"), triple.subset) for triple in kept):
        here = [triple for triple in kept if (triple.at.get("text"), triple.subset) == (text, subset)]
        on = [triple for triple in here if triple.at["sigma"] in rungs]
        parts = {"all": here}
        if on and len(on) < len(here):
            parts |= {"on ladder": on, "off ladder": [triple for triple in here if triple not in on]}
        for which, group in parts.items():
            yield group, {**group[0].at, "sigma": which}


def _row(triples: Sequence[_Triple], at: Mapping[str, Coordinate]) -> FreedomRow:
    freed, distilled, reference = (
        np.stack([getattr(triple, side) for triple in triples]) for side in ("freed", "distilled", "reference")
    )
    verdict, found = "unknown", None
    if all(np.isfinite(side).all() for side in (freed, distilled, reference)):
        found = closed(freed, distilled, reference)
        verdict = "no gap" if found is None else "gap"
        if found is not None and found.low < 0 < found.high and found.high - found.low > NOISY:
            verdict = TOO_NOISY
    found = found or Closed(math.nan, math.nan, math.nan, False, math.nan)
    counts = [triple.count for triple in triples if triple.count is not None]
    return FreedomRow(
        name=triples[0].name,
        at=at,
        subset=triples[0].subset,
        unit=triples[0].unit,
        distilled=float(distilled[:, 0].mean()),
        freed=float(freed[:, 0].mean()),
        reference=float(reference[:, 0].mean()),
        verdict=verdict,
        count=min(counts, default=None),
        **found._asdict(),
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
