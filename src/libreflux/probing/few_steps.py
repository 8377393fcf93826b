"""What an adapter did to few-step drawing: the share of it that is kept, and the share of new pictures that is learnt.

Both are shares of a way between two ends that are measured too, on the same prompts and seeds. So every number has a
bootstrap interval over pictures or prompts, in which all three move together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libreflux import seeding
from libreflux.probing.features import TwoTowers, agreement
from libreflux.probing.judges import Judge, Verdict
from libreflux.probing.metrics.bootstrap import Statistic, mean, measured, share
from libreflux.probing.metrics.distances import frechet_together, kernel_replicates
from libreflux.probing.metrics.image_stats import ALL, Look, accuracies
from libreflux.probing.results import Measure
from libreflux.probing.seen import Seen
from libreflux.probing.shares import YES_OR_NO, Share, exactly, ordered, share_of_way
from libreflux.probing.subjects import ParsedPrompt
from libreflux.probing.units import Over

SPLITS = 4
"""Ways in which the new pictures are cut into halves; a distance is the mean over them."""
LEAST_PICTURES, LEAST_PROMPTS = 4, 2
CEILING = "judge_ceiling"
KEEP = 0.9
"""The share of the few steps below which a training is told to have gone too far."""
MEANINGS = {
    "accuracy": "pictures in which the judge finds what was asked for",
    "agreement": "cosine of picture and prompt, as a whole CLIP sees them",
    "picture distance": "mean distance of a picture from one of the distilled model's own of the same prompt",
    "FD": "Fréchet distance from the distilled model's own pictures",
    "KD": "kernel distance from the distilled model's own pictures",
    "sharpness": "standard deviation of the Laplacian",
}
"""Measure of what is kept to what it is."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What one model drew.

    Attributes:
        new: from the captions of the new pictures; None where it draws none (the broken one).
        others: from the other prompts.
        guided: pairs of the same prompts and seeds at guidance 1 and 3; None where it draws none.
    """

    new: Seen | None
    others: Seen
    guided: tuple[Seen, Seen] | None = None


@dataclass(frozen=True, eq=False)
class Ends:
    """What adapters are compared with.

    Attributes:
        new: the new pictures, once they have been through the VAE.
        distilled: the distilled model.
        again: its other prompts from other seeds.
        broken: a model that has lost its few steps.
        prompts: the other prompts.
        judge: who saw all of it.
        seed: of halves and resampling.
        captions: of the new pictures.
    """

    new: Seen
    distilled: Pictures
    again: Seen
    broken: Seen
    prompts: Sequence[ParsedPrompt]
    judge: Judge
    seed: int = 0
    captions: Sequence[ParsedPrompt] = ()

    @functools.cached_property
    def of_others(self) -> dict[str, dict[str, Measure]]:
        """What the two ends of "kept" measure, by measure: "distilled" and "broken"."""
        drawn = {"distilled": self.distilled.others, "broken": self.broken}
        return {of: dict(_of_others(of, seen, self)) for of, seen in drawn.items()}

    @functools.cached_property
    def to_new(self) -> dict[str, dict[str, Measure]]:
        """What the two ends of "learnt" measure, by measure: "distilled" and "halves"."""
        assert self.distilled.new is not None
        sets = {"distilled": self.distilled.new, "halves": self.new}
        return {of: dict(_to_new(of, seen, self)) for of, seen in sets.items()}

    @functools.cached_property
    def ceiling(self) -> Measure | None:
        """In which share of the new pictures the judge finds what their captions name; None where they name nothing.

        A judge that cannot read the new look takes every picture that has it for a broken one. Only what the prompts
        name too is asked: more would be found more seldom in any look.
        """
        also = {question for one in self.prompts for question in one.named}
        captions = [ParsedPrompt(one.text, {q: a for q, a in one.named.items() if q in also}) for one in self.captions]
        found = _right(self.new, self.judge, captions) if captions else None
        if found is None:
            return None
        return _measure("accuracy", "new pictures", share(found), len(self.new), self, name=CEILING, over="pictures")

    @property
    def is_blind(self) -> bool:
        """Whether the judge finds clearly less in the new pictures than in the distilled model's."""
        usual = self.of_others["distilled"].get("accuracy")
        return self.ceiling is not None and usual is not None and self.ceiling.high < usual.low


@dataclass(frozen=True)
class Point:
    """What was found of one adapter.

    Attributes:
        name: of the adapter, or its step.
        step: of training; None where nobody knows.
        learnt, kept: by measure, the lowest first, the noisy ones last.
        guidance: the pictures' answers to guidance 1 → 3, of the distilled model and of this one.
        measures: its own values that the shares are made of, with intervals.
        unchanged: it draws the distilled model's very pictures.
    """

    name: str
    step: int | None
    learnt: tuple[Share, ...]
    kept: tuple[Share, ...]
    guidance: tuple[Measure, Measure] | None
    measures: tuple[Measure, ...]
    unchanged: bool = False

    @property
    def leading(self) -> tuple[Share, Share]:
        """(kept, learnt), each by the measure with the lowest share."""
        return self.kept[0], self.learnt[0]

    @property
    def sentence(self) -> str:
        """As "few-step ability kept: 93 % [90, 96]; learnt: 71 % [64, 77]"."""
        kept, learnt = self.leading
        return f"few-step ability kept: {kept.text}; learnt: {learnt.text}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, without replicates."""
        guidance = None
        if self.guidance is not None:
            rows = dict(zip(("distilled", "adapted"), self.guidance, strict=True))
            guidance = {of: with_intervals(row) for of, row in rows.items()}
        return {
            "name": self.name,
            "step": self.step,
            "sentence": self.sentence,
            "unchanged": self.unchanged,
            "kept": [one.as_json() for one in self.kept],
            "learnt": [one.as_json() for one in self.learnt],
            "guidance_answer": guidance,
        }


def point(name: str, step: int | None, adapted: Pictures, ends: Ends) -> Point:
    """Compares what an adapted model drew with the ends.

    Args:
        name: of the adapter.
        step: of its training.
        adapted: with `new`.
        ends: what it is compared with, drawn from the same prompts and seeds.
    """
    mine, ours = adapted.new, ends.distilled.new
    assert mine is not None
    assert ours is not None
    found = dict(_of_others("adapted", adapted.others, ends))
    apart = dict(_to_new("adapted", mine, ends))
    ours_kept, ours_new = ends.of_others, ends.to_new
    kept = [
        share_of_way(by, one, ours_kept["distilled"][by], ours_kept["broken"][by], left=True)
        for by, one in found.items()
    ]
    learnt = [share_of_way(by, one, ours_new["distilled"][by], ours_new["halves"][by]) for by, one in apart.items()]
    kept_all, learnt_nothing = adapted.others.same_as(ends.distilled.others), mine.same_as(ours)
    if kept_all or adapted.others.same_as(ends.broken):
        kept = [exactly(one, float(kept_all)) for one in kept]
    if learnt_nothing:
        learnt = [exactly(one, 0.0) for one in learnt]
    answers = None
    if adapted.guided is not None and ends.distilled.guided is not None:
        answers = _answer("distilled", ends.distilled.guided, ends), _answer("adapted", adapted.guided, ends)
    rows = (*found.values(), *apart.values(), *(answers or ()))
    return Point(name, step, ordered(learnt), ordered(kept), answers, rows, kept_all and learnt_nothing)


def _of_others(of: str, seen: Seen, ends: Ends) -> Iterator[tuple[str, Measure]]:
    """What pictures of the other prompts say, by measure; what they cannot say is left out."""
    if (right := _right(seen, ends.judge, ends.prompts)) is not None:
        yield "accuracy", _measure("accuracy", of, share(right), len(seen), ends, unit=YES_OR_NO)
    if isinstance(ends.judge, TwoTowers):
        cosines = agreement(seen.features, ends.judge.texts([one.text for one in ends.prompts])[0])
        yield "agreement", _measure("agreement", of, mean(cosines), len(seen), ends)
    again = ends.again.features
    apart = (seen.features - again).double().square().mean(dim=1).sqrt().numpy()
    yield "picture distance", _measure("picture distance", of, mean(apart), len(seen), ends)
    for kind, statistic in _DISTANCES.items():
        beside = functools.partial(_beside, statistic, seen.features, again)
        yield kind, _measure(kind, of, beside, len(seen), ends, centred=True)
    yield "sharpness", _measure("sharpness", of, mean(seen.sharpness.numpy()), len(seen), ends)


def _right(seen: Seen, judge: Judge, prompts: Sequence[ParsedPrompt]) -> np.ndarray | None:
    """[N] 1 where the judge finds what was asked for, 0 where not, NaN where it cannot know; None: it knows too few."""
    look = Look(np.zeros(len(seen)), np.zeros(len(seen)), Verdict(seen.answers, seen.features))
    right = accuracies(look, judge, prompts)[ALL]
    return right if np.isfinite(right).sum() >= LEAST_PROMPTS else None


_DISTANCES = {"FD": frechet_together, "KD": kernel_replicates}


def _beside(statistic: Any, features: Tensor, again: Tensor, weights: np.ndarray) -> np.ndarray:
    """A distance of two sets of pictures of the same prompts, which are resampled together."""
    return _where_two(weights, weights, lambda rows, others: statistic(features, again, rows, others))


def _to_new(of: str, seen: Seen, ends: Ends) -> Iterator[tuple[str, Measure]]:
    """The distances of one half of a set from the other half of the new pictures, by measure.

    All sets are cut alike: what few pictures add to a distance is the same for all of them.
    """
    cuts = halves(len(ends.new), ends.seed)
    for kind, statistic in _DISTANCES.items():

        def distance(weights: np.ndarray, statistic: Any = statistic) -> np.ndarray:
            found = []
            for first in cuts:
                for side in (first, ~first):
                    rows, others = _only(weights, side), _only(weights, ~side)
                    here, there = seen.features[torch.from_numpy(side)], ends.new.features[torch.from_numpy(~side)]
                    found.append(_where_two(rows, others, functools.partial(statistic, here, there)))
            total: np.ndarray = np.mean(found, axis=0)
            return total

        yield kind, _measure(kind, of, distance, len(seen), ends, centred=True, name="distance to new", over="pictures")


def halves(count: int, seed: int) -> list[np.ndarray]:
    """`SPLITS` times [count] bool: which of the pictures are in the first half, drawn by (seed, split)."""
    found = []
    for split in range(SPLITS):
        chosen = np.zeros(count, bool)
        chosen[seeding.rng(seed, "halves", split).permutation(count)[: count // 2]] = True
        found.append(chosen)
    return found


def _only(weights: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The weights of some units, which sum to 1; 0 where a resample has none of them."""
    kept = weights[:, members]
    total = kept.sum(axis=1, keepdims=True)
    return np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)


def _where_two(rows: np.ndarray, others: np.ndarray, statistic: Any) -> np.ndarray:
    """A distance for each row; NaN where either side has fewer than two pictures."""
    good = ((rows > 0).sum(axis=1) > 1) & ((others > 0).sum(axis=1) > 1)
    found = np.full(len(rows), np.nan)
    if good.any():
        found[good] = statistic(rows[good], others[good])
    return found


def _answer(of: str, pair: tuple[Seen, Seen], ends: Ends) -> Measure:
    """How far guidance 3 moves a picture from guidance 1, in the judge's features."""
    apart = (pair[1].features - pair[0].features).double().square().mean(dim=1).sqrt().numpy()
    return _measure("", of, mean(apart), len(apart), ends, name="answer to guidance")


def _measure(
    by: str,
    of: str,
    statistic: Statistic,
    count: int,
    ends: Ends,
    *,
    centred: bool = False,
    name: str = "of other prompts",
    over: Over = "prompts",
    unit: str = "",
) -> Measure:
    at = {"by": by, "of": of} if by else {"of": of}
    everyone = {"all": np.arange(count)}
    [found] = measured(name, at, statistic, count, everyone, seed=ends.seed, unit=unit, centred=centred, over=over)
    return found


def stop(points: Sequence[Point], keep: float = KEEP) -> tuple[Point, str]:
    """The checkpoint to stop at, and why: of those that keep enough, the one that has learnt the most.

    Where learning is too noisy, it is the last of them; where none keeps enough, the one that keeps the most.

    Args:
        points: of a run's checkpoints, by step.
        keep: the share of few-step ability that is enough.
    """
    known = [one for one in points if not one.leading[0].noisy]
    if not known:
        return points[-1], f"Too noisy to tell where to stop. {_step(points[-1])}, the last: {points[-1].sentence}"
    enough = [one for one in known if one.leading[0].value >= keep]
    if not enough:
        best = max(known, key=lambda one: one.leading[0].value)
        surely = all(one.leading[0].high < keep for one in known)
        told = f"No checkpoint keeps {keep:.0%}" if surely else f"Of no checkpoint it is shown that it keeps {keep:.0%}"
        return best, f"{told}. {_step(best)} keeps the most: {best.sentence}"
    learnt = [one for one in enough if not one.leading[1].noisy]
    best = max(learnt, key=lambda one: one.leading[1].value) if learnt else enough[-1]
    later = [one for one in known if one.step is not None and best.step is not None and one.step > best.step]
    lost = any(one.leading[0].value < keep for one in later)
    why = f"later ones keep less than {keep:.0%}" if lost else f"it keeps {keep:.0%} or more"
    return best, f"Stop at {_step(best).lower()} ({why}): {best.sentence}"


def _step(one: Point) -> str:
    return one.name if one.step is None else f"Step {one.step:,}"


def with_intervals(row: Measure) -> Mapping[str, float]:
    """A measure's value and the ends of its interval."""
    return {"value": row.value, "low": row.low, "high": row.high}
