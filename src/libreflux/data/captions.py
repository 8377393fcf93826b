"""Which caption a visit to a picture sees: keyed by (seed, sample, visit), so no worker and no resume can change it."""

from __future__ import annotations

from collections.abc import Sequence

from libreflux import keyed
from libreflux.data.sources import Sample
from libreflux.errors import DataError
from libreflux.recipe import DataSource


def choose(
    captions: Sequence[str], weights: Sequence[float] | None, dropout: float, seed: int, sample_id: str, epoch: int
) -> int | None:
    """The index of the caption to show, or None for the empty prompt.

    Args:
        captions: at least one.
        weights: as many, zero or more, not all zero; None: all alike.
        dropout: probability of None, in [0, 1].
        seed: the run's seed.
        sample_id: the picture's id.
        epoch: how often this picture was visited before (its epoch, when an epoch shows it once).
    """
    drop, pick = keyed.rng(seed, "caption", sample_id, epoch).random(2)
    if drop < dropout:
        return None
    if weights is None:
        return min(int(pick * len(captions)), len(captions) - 1)
    target, reached, last = pick * sum(weights), 0.0, 0
    for index, weight in enumerate(weights):
        if weight <= 0:
            continue
        reached, last = reached + weight, index
        if target < reached:
            return index
    return last  # pick so near 1 that rounding left it above the sum


def caption_weights(source: DataSource, sample: Sample) -> list[float] | None:
    """The weights of this sample's captions under its source's ``captions``; None: all alike.

    Several captions of one name share its weight. Names and lines that this sample lacks leave their weight to the
    others.

    Raises:
        DataError: none of this sample's captions has a weight above zero.
    """
    wanted = source.captions
    if wanted is None:
        return None
    if isinstance(wanted, dict):
        weights = [wanted.get(kind, 0.0) / sample.kinds.count(kind) for kind in sample.kinds]
        has = ", ".join(sorted({kind or "(no name)" for kind in sample.kinds}))
    else:
        weights = [*wanted, *[0.0] * len(sample.captions)][: len(sample.captions)]
        has = f"{len(sample.captions)} lines"
    if not sum(weights) > 0:
        raise DataError(
            f"no caption that data.captions gives a weight; it has {has}",
            where=sample.path,
            mend="add one or the weight",
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
                raise DataError(f"no caption is named {name!r}", where=source.path, mend=f"the names here: {known}")
    elif source.captions is not None:
        most = max(len(sample.captions) for sample in samples)
        if len(source.captions) > most:
            raise DataError(
                f"{len(source.captions)} caption weights, but at most {most} captions",
                where=source.path,
                mend="give fewer",
            )
    for sample in samples:
        caption_weights(source, sample)
