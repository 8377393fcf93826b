"""Which features tell a model from a worse one: distances to real pictures, and the interval of their difference.

A feature in which a distance cannot tell a base from a spoilt copy of it cannot tell how free a model is either. So
features are chosen by that, on one half of the prompts, and never by the model that is in question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from libreflux.probing.metrics.bootstrap import REPLICATES, other_side
from libreflux.probing.metrics.distances import frechet_replicates, kernel_replicates
from libreflux.probing.metrics.measures import CONFIDENCE, resampled

Distance = Callable[[Tensor, Tensor, np.ndarray, np.ndarray], np.ndarray]
DISTANCES: Mapping[str, Distance] = {"FD": frechet_replicates, "KD": kernel_replicates}


@dataclass(frozen=True, kw_only=True)
class Telling:
    """One distance in one feature, of a model and a worse one, to the same real pictures.

    Attributes:
        feature: its name.
        distance: "FD" or "KD".
        against: what the worse one is.
        good, worse: value and ends of its 95 % interval; drawn and real pictures are resampled.
        difference: worse − good, with the ends of its paired interval.
        effect: the difference in its standard deviations.
    """

    feature: str
    distance: str
    against: str
    good: tuple[float, float, float]
    worse: tuple[float, float, float]
    difference: tuple[float, float, float]
    effect: float

    @property
    def apart(self) -> bool:
        """Whether the two own intervals do not touch, the worse one's above."""
        return self.worse[1] > self.good[2]

    @property
    def tells(self) -> bool:
        """Whether the paired interval of the difference is above 0: less is asked than by `apart`."""
        return self.difference[1] > 0

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        told = {**asdict(self), "apart": self.apart, "tells": self.tells}
        return {name: _plain(value) for name, value in told.items()}


def telling(feature: str, against: str, good: Tensor, worse: Tensor, real: Tensor, *, seed: int = 0) -> list[Telling]:
    """By each of `DISTANCES`.

    Args:
        feature, against: names.
        good, worse: features [N, D] of pictures of the same N prompts and seeds, which are resampled alike.
        real: features [M, D] of real pictures, resampled apart.
        seed: of the resampling.
    """
    count = len(good)
    weights = np.vstack([np.full((1, count), 1 / count), resampled(count, replicates=REPLICATES, seed=seed)])
    others, found = other_side(len(real), seed=seed), []
    for kind, distance in DISTANCES.items():
        sides = [distance(one, real, weights, others) for one in (good, worse)]
        # Repeats in a resample push FD one way: its replicates are moved so that their mean is the value.
        sides = [one - (np.nanmean(one[1:]) - one[0]) * _later(one) if kind == "FD" else one for one in sides]
        gap = sides[1] - sides[0]
        spread = float(np.nanstd(gap[1:]))
        found.append(
            Telling(
                feature=feature,
                distance=kind,
                against=against,
                good=_interval(sides[0]),
                worse=_interval(sides[1]),
                difference=_interval(gap),
                effect=float(gap[0]) / spread if spread > 0 else 0.0,
            )
        )
    return found


def most_telling(found: Sequence[Telling]) -> tuple[str, str] | None:
    """(feature, distance) that tells the model from every worse one, the least of its effects being the largest.

    Returns:
        None where none tells it from all of them.
    """
    effects: dict[tuple[str, str], list[float]] = {}
    for one in found:
        effects.setdefault((one.feature, one.distance), []).append(one.effect if one.tells else -np.inf)
    least = {key: min(each) for key, each in effects.items()}
    best = max(least, key=lambda key: (least[key], key), default=None)
    return best if best is not None and np.isfinite(least[best]) else None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _later(values: np.ndarray) -> np.ndarray:
    """0 for the value itself, 1 for its replicates."""
    return (np.arange(len(values)) > 0).astype(np.float64)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return float(values[0]), float(low), float(high)
