"""What guidance does to drawn pictures: clipping, spread, accuracy and distance, by scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.bootstrap import Groups, Statistic, mean, measured, other_side, share
from libreflux.probing.metrics.distances import frechet_replicates, kernel_replicates
from libreflux.probing.metrics.image_stats import ALL, Look, accuracies
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Plan, Section, SectionResult, prompted
from libreflux.probing.sections import agreement
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt

SATURATED = 2.0
"""Saturation starts where more pixels are clipped than in so many times the VAE's own reconstructions."""


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Every prompt at every scale."""
    return Plan([_batch(settings, prompts, scale) for scale in settings.guidance])


def _batch(settings: Settings, prompts: Sequence[ParsedPrompt], scale: float) -> PictureBatch:
    return prompted(settings, prompts, scale, settings.draw_steps)


def measure(context: ProbeContext) -> SectionResult:
    """`clipped`, `latents_std`, `accuracy`, `distance` by guidance, and the scales where quality and clipping turn.

    With a whole CLIP also `agreement`.
    """
    settings, prompts, seed = context.settings, context.prompts, context.settings.seed
    groups, count = context.groups([one.text for one in prompts]), len(prompts)
    batches = {scale: _batch(settings, prompts, scale) for scale in settings.guidance}
    looks = {scale: context.look(each) for scale, each in batches.items()}
    rows = ceiling(context)
    for scale, look in looks.items():
        at = {"guidance": scale}
        rows += measured("clipped", at, mean(look.clipped), count, groups, seed=seed, unit="share of pixels")
        rows += measured("latents_std", at, mean(look.std), count, groups, seed=seed)
    saturation = first_above(
        {scale: mean(look.clipped) for scale, look in looks.items()},
        SATURATED * float(context.held_out_look().clipped.mean()),
    )
    rows += measured("saturation_guidance", {}, saturation, count, groups, seed=seed, unit="guidance")
    if context.judge is not None:
        rows += judged(context, looks, groups)
    if agreement.measures(context):
        rows += agreeing(context, looks, groups)
    shown = range(min(settings.shown, count))
    pictures = [row for each in batches.values() for row in context.keep("guidance", each, shown)]
    return SectionResult(rows, pictures)


def ceiling(context: ProbeContext) -> list[Measure]:
    """What clipping, spread and the judge say of held-out pictures that have been through the VAE."""
    captions, seed = context.held_out_captions(), context.settings.seed
    groups, look, count = context.groups(captions), context.held_out_look(), len(captions)
    rows = list[Measure]()

    def add(name: str, at: dict[str, Coordinate], statistic: Statistic, unit: str) -> None:
        rows.extend(measured(name, at, statistic, count, groups, seed=seed, unit=unit, over="pictures"))

    add("held_out_clipped", {}, mean(look.clipped), "share of pixels")
    add("held_out_latents_std", {}, mean(look.std), "")
    if context.judge is not None:
        for what, right in accuracies(look, context.judge, [context.parse(caption) for caption in captions]).items():
            if np.isfinite(right).any():
                add("judge_ceiling", {"what": what}, share(right), "share")
    return rows


def judged(context: ProbeContext, looks: Mapping[float, Look], groups: Groups) -> list[Measure]:
    """`accuracy`, `distance` and `best_guidance`."""
    assert context.judge is not None
    count, seed, rows = len(context.prompts), context.settings.seed, list[Measure]()
    right = {scale: accuracies(look, context.judge, context.prompts) for scale, look in looks.items()}
    for scale, each in right.items():
        for what, values in each.items():
            if np.isfinite(values).any():
                at: dict[str, Coordinate] = {"guidance": scale, "what": what}
                rows += measured("accuracy", at, share(values), count, groups, seed=seed, unit="share")
    distances = distance_rows(context, looks, groups)
    rows += distances
    if any(np.isfinite(each[ALL]).any() for each in right.values()):
        best = best_of({scale: mean(each[ALL]) for scale, each in right.items()})
        rows += measured("best_guidance", {"by": "accuracy"}, best, count, groups, seed=seed, unit="guidance")
    elif distances:
        rows += _nearest(distances, list(looks))
    return rows


def agreeing(context: ProbeContext, looks: Mapping[float, Look], groups: Groups) -> list[Measure]:
    """`agreement`, the scale where it is best, and that of real pictures."""
    rows, by_scale = agreement.held_out(context), dict[float, Statistic]()
    for scale, look in looks.items():
        found, values = agreement.rows_at(context, look, {"guidance": scale}, groups)
        rows += found
        by_scale[scale] = mean(values)
    count, seed = len(context.prompts), context.settings.seed
    at = {"by": "agreement"}
    return rows + measured("best_guidance", at, best_of(by_scale), count, groups, seed=seed, unit="guidance")


def distance_rows(context: ProbeContext, looks: Mapping[float, Look], groups: Groups) -> list[Measure]:
    """Fréchet ("FD") and kernel ("KD") distance of a subset's drawn pictures to its held-out ones.

    Both compare models, and mean little alone. Few pictures raise FD, by the same amount for every model; KD is
    unbiased for independent prompts, and falls below 0 where prompts repeat fewer subjects than chance would. Their
    intervals are over both sides: prompts and held-out pictures are resampled, these alike for all models and scales.
    """
    captions, reference = context.groups(context.held_out_captions()), context.held_out_look().verdict
    assert reference is not None
    rows = list[Measure]()
    for subset, members in groups.items():
        if len(captions[subset]) < 2:
            continue
        target = reference.features[captions[subset].tolist()]
        others = other_side(len(target), seed=context.settings.seed)
        for scale, look in looks.items():
            assert look.verdict is not None
            features = look.verdict.features
            for kind, statistic in (("FD", frechet_replicates), ("KD", kernel_replicates)):
                rows += measured(
                    "distance",
                    {"guidance": scale, "kind": kind},
                    lambda weights, f=features, t=target, s=statistic, o=others: s(f, t, weights, o),  # type: ignore[misc]
                    len(context.prompts),
                    {subset: members},
                    seed=context.settings.seed,
                    unit="judge features",
                    centred=kind == "FD",
                )
    return rows


def _nearest(distances: Sequence[Measure], scales: Sequence[float]) -> list[Measure]:
    rows = list[Measure]()
    for subset in dict.fromkeys(one.subset for one in distances):
        here = [one for one in distances if one.subset == subset and one.at["kind"] == "FD"]
        table = np.array([[one.value, *one.replicates] for one in here])
        picked = np.array(scales)[table.argmin(axis=0)]
        low, high = np.quantile(picked[1:], [0.025, 0.975])
        rows.append(
            Measure(
                name="best_guidance",
                at={"by": "distance"},
                subset=subset,
                value=float(picked[0]),
                low=float(low),
                high=float(high),
                replicates=picked[1:].tolist(),
                unit="guidance",
            )
        )
    return rows


def best_of(by_scale: Mapping[float, Statistic]) -> Statistic:
    """The scale at which a statistic is highest; of equals the lowest scale."""
    scales = sorted(by_scale)
    return lambda weights: np.array(scales)[np.argmax([by_scale[scale](weights) for scale in scales], axis=0)]


def first_above(by_scale: Mapping[float, Statistic], limit: float) -> Statistic:
    """The lowest scale at which a statistic exceeds a limit; NaN where none does."""
    scales = sorted(by_scale)

    def statistic(weights: np.ndarray) -> np.ndarray:
        above = np.array([by_scale[scale](weights) > limit for scale in scales])
        return np.where(above.any(axis=0), np.array(scales)[above.argmax(axis=0)], np.nan)

    return statistic


SECTION = Section("guidance", 2, plan, measure, drawn=True)
