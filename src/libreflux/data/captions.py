"""Which caption a visit to a picture reads: keyed by (seed, sample, visit), so no worker or resume can change it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from libreflux import seeding
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.printing import counted
from libreflux.recipe import DataSource


class CaptionChoice:
    """The captions of N samples, by number, and how they are chosen.

    Args:
        ids: [N] 64-bit numbers of the samples, digits of their content hash.
        counts: [N] captions of each, at least one.
        weights: for each sample one weight for each of its captions, zero or more, not all zero; read once.
        dropout: [N] probability, in [0, 1], that a visit reads the empty prompt.
        seed: the run's.
    """

    def __init__(
        self,
        ids: np.ndarray,
        counts: np.ndarray,
        weights: Iterable[Sequence[float]],
        dropout: np.ndarray,
        seed: int,
    ) -> None:
        self._ids, self._dropout, self._seed = ids, dropout, seed
        self.first = np.cumsum(counts) - counts
        """[N] where each sample's captions begin in the row of all captions."""
        flat = np.fromiter((weight for row in weights for weight in row), np.float64, int(counts.sum()))
        owner = np.repeat(np.arange(len(counts)), counts)
        sums = np.cumsum(flat)
        base = sums[self.first] - flat[self.first]
        whole = sums[self.first + counts - 1] - base
        # Sample n's shares lie in [n, n + 1]: one sorted row, so that one search serves any number of samples.
        self._shares = owner + (sums - base[owner]) / whole[owner]
        places = np.where(flat > 0, np.arange(len(flat)), 0)
        self._last = np.maximum.reduceat(places, self.first)  # rounding may leave a draw above every share

    def choose(self, samples: np.ndarray, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For [n] visits: the place of the chosen caption in the row of all captions, and whether it is dropped."""
        draws = seeding.uniforms(self._seed, "caption", self._ids[samples], visits, 2)
        places = np.searchsorted(self._shares, samples + draws[:, 1], side="right")
        return np.minimum(places, self._last[samples]), draws[:, 0] < self._dropout[samples]


def caption_weights(source: DataSource, sample: Sample) -> list[float]:
    """The weights of this sample's captions under its source's ``captions``; without it all are alike.

    Several captions of one name share its weight. Names and lines that this sample lacks leave their weight to the
    others.

    Raises:
        DataError: none of this sample's captions has a weight above zero.
    """
    wanted = source.captions
    if wanted is None:
        return [1.0] * len(sample.captions)
    if isinstance(wanted, dict):
        weights = [wanted.get(kind, 0.0) / sample.kinds.count(kind) for kind in sample.kinds]
        has = ", ".join(sorted({kind or "(no name)" for kind in sample.kinds}))
    else:
        weights = [*wanted, *[0.0] * len(sample.captions)][: len(sample.captions)]
        has = counted(len(sample.captions), "line")
    if not sum(weights) > 0:
        raise DataError(
            f"no caption that data.captions gives a weight; it has {has}",
            where=sample.path,
            hint="add one or the weight",
        )
    return weights


def check_weights(source: DataSource, samples: Sequence[Sample]) -> None:
    """Refuses weights that no picture or some picture cannot use.

    Raises:
        DataError: a named weight that no caption carries, a line that no picture has, or a picture left without a
            caption.
    """
    if isinstance(source.captions, dict):
        kinds = {kind for sample in samples for kind in sample.kinds}
        for name in source.captions:
            if name not in kinds:
                known = ", ".join(sorted(kind for kind in kinds if kind)) or "none"
                raise DataError(f"no caption is named {name!r}", where=source.path, hint=f"the names here: {known}")
    elif source.captions is not None:
        most = max(len(sample.captions) for sample in samples)
        if len(source.captions) > most:
            raise DataError(
                f"{counted(len(source.captions), 'caption weight')}, but at most {counted(most, 'caption')}",
                where=source.path,
                hint="give fewer",
            )
    for sample in samples:
        caption_weights(source, sample)
