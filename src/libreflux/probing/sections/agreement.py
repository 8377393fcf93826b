"""How well drawn pictures agree with their prompts, as a whole CLIP sees it: rows of other sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from libreflux.printing import counted, get_logger
from libreflux.probing.context import ProbeContext
from libreflux.probing.features import TwoTowers, agreement
from libreflux.probing.metrics.bootstrap import Groups, mean, measured, share
from libreflux.probing.metrics.image_stats import Look
from libreflux.probing.results import Coordinate, Measure

logger = get_logger(__name__)

UNIT = "cosine"


def measures(context: ProbeContext) -> bool:
    """Whether there is a judge that knows texts."""
    return isinstance(context.judge, TwoTowers)


def found(context: ProbeContext, look: Look, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[N] `agreement` of N pictures and their texts, and [N] bool: which texts were cut."""
    assert isinstance(context.judge, TwoTowers)
    assert look.verdict is not None
    features, cut = context.judge.texts(texts)
    return agreement(look.verdict.features, features), cut


def rows_at(
    context: ProbeContext, look: Look, at: Mapping[str, Coordinate], groups: Groups
) -> tuple[list[Measure], np.ndarray]:
    """`agreement` of the prompts' pictures at a place, and [N] of each picture."""
    values, _ = found(context, look, [one.text for one in context.prompts])
    seed = context.settings.seed
    return measured("agreement", at, mean(values), len(values), groups, seed=seed, unit=UNIT), values


def held_out(context: ProbeContext) -> list[Measure]:
    """`held_out_agreement` of real pictures and their captions, and how many texts were cut: `agreement_cut`."""
    captions, seed, rows = context.held_out_captions(), context.settings.seed, list[Measure]()
    values, cut = found(context, context.held_out_look(), captions)
    groups = context.groups(captions)
    rows += measured("held_out_agreement", {}, mean(values), len(values), groups, seed=seed, unit=UNIT, over="pictures")
    prompts = [one.text for one in context.prompts]
    assert isinstance(context.judge, TwoTowers)
    for what, texts, long in (("prompts", prompts, context.judge.texts(prompts)[1]), ("captions", captions, cut)):
        if long.any():
            logger.warning(
                "%d of %s are longer than the %d tokens that the CLIP reads: the rest does not count for agreement",
                long.sum(),
                counted(len(texts), what.removesuffix("s")),
                context.judge.tokens,
            )
        everyone = {"all": np.arange(len(texts))}
        at = {"of": what}
        rows += measured(
            "agreement_cut",
            at,
            share(long.astype(np.float64)),
            len(texts),
            everyone,
            seed=seed,
            unit="share of texts",
            over="prompts" if what == "prompts" else "pictures",
        )
    return rows
