"""Few steps against many: how far pictures of one seed and prompt are apart, and how straight the paths are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.bootstrap import mean, measured, ratio, share
from libreflux.probing.metrics.image_stats import Look, accuracies
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Plan, Section, SectionResult, prompted
from libreflux.probing.sections import agreement
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Every prompt at every number of steps, and without guidance."""
    return Plan([*_batches(settings, prompts).values(), _unguided(settings, prompts)])


def _batches(settings: Settings, prompts: Sequence[ParsedPrompt]) -> dict[int, PictureBatch]:
    return {steps: prompted(settings, prompts, settings.own_guidance, steps) for steps in settings.steps}


def _unguided(settings: Settings, prompts: Sequence[ParsedPrompt]) -> PictureBatch:
    return prompted(settings, prompts, 1.0, settings.draw_steps)


def measure(context: ProbeContext) -> SectionResult:
    """`step_gap`, `accuracy` and `agreement` by steps at the model's own guidance, and `straightness`."""
    settings, prompts, seed = context.settings, context.prompts, context.settings.seed
    groups, count = context.groups([one.text for one in prompts]), len(prompts)
    batches, rows = _batches(settings, prompts), list[Measure]()
    first, *others = settings.steps
    for steps in others:
        gap, unit = apart(context, batches[first], batches[steps])
        at = {"steps": first, "against": steps}
        rows += measured("step_gap", at, mean(gap), count, groups, seed=seed, unit=unit)
    if context.judge is not None:
        for steps, each in batches.items():
            for what, right in accuracies(context.look(each), context.judge, prompts).items():
                if np.isfinite(right).any():
                    place: dict[str, Coordinate] = {"steps": steps, "guidance": settings.own_guidance, "what": what}
                    rows += measured("accuracy", place, share(right), count, groups, seed=seed, unit="share")
    if agreement.measures(context):
        for steps, each in batches.items():
            place = {"steps": steps, "guidance": settings.own_guidance}
            rows += agreement.rows_at(context, context.look(each), place, groups)[0]
    path = context.drawn(_unguided(settings, prompts))
    bent = ratio((path.energy - path.length).clamp_min(0).numpy(), path.length.numpy())
    rows += measured("straightness", {}, bent, count, groups, seed=seed, unit="of E‖x1 − x0‖²")
    shown = range(min(settings.shown, count))
    return SectionResult(rows, [row for each in batches.values() for row in context.keep("steps", each, shown)])


def apart(context: ProbeContext, a: PictureBatch, b: PictureBatch) -> tuple[np.ndarray, str]:
    """[N] distance of pictures one by one, and its unit: judge features where there is a judge, else latents."""
    if context.judge is None:
        difference = context.drawn(a).latents - context.drawn(b).latents
        return difference.double().square().flatten(1).mean(dim=1).sqrt().numpy(), "latents, RMS"
    return feature_distance(context.look(a), context.look(b)), "judge features, RMS"


def feature_distance(a: Look, b: Look) -> np.ndarray:
    """[N] root mean square difference of judge features, picture by picture."""
    assert a.verdict is not None
    assert b.verdict is not None
    found: np.ndarray = (a.verdict.features - b.verdict.features).double().square().mean(dim=1).sqrt().numpy()
    return found


SECTION = Section("steps", 2, plan, measure)
