"""Few steps against many: how far pictures of one seed and prompt are apart, and how straight the paths are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from libreflux.probing.context import Bench
from libreflux.probing.drawing import Wanted
from libreflux.probing.metrics.bootstrap import mean, measured, ratio
from libreflux.probing.metrics.image_stats import Look, accuracies
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Found, Plan, Section, prompted
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import Asked


def plan(settings: Settings, asked: Sequence[Asked]) -> Plan:
    """Every prompt at every number of steps, and without guidance."""
    return Plan([*_wanted(settings, asked).values(), _unguided(settings, asked)])


def _wanted(settings: Settings, asked: Sequence[Asked]) -> dict[int, Wanted]:
    return {steps: prompted(settings, asked, settings.own_guidance, steps) for steps in settings.steps}


def _unguided(settings: Settings, asked: Sequence[Asked]) -> Wanted:
    return prompted(settings, asked, 1.0, settings.draw_steps)


def measure(bench: Bench) -> Found:
    """`step_gap`, `accuracy` by steps at the model's own guidance, and `straightness`."""
    settings, asked, seed = bench.settings, bench.asked, bench.settings.seed
    groups, count = bench.groups([one.text for one in asked]), len(asked)
    wanted, rows = _wanted(settings, asked), list[Measure]()
    first, *others = settings.steps
    for steps in others:
        gap, unit = apart(bench, wanted[first], wanted[steps])
        at = {"steps": first, "against": steps}
        rows += measured("step_gap", at, mean(gap), count, groups, seed=seed, unit=unit)
    if bench.judge is not None:
        for steps, each in wanted.items():
            for what, right in accuracies(bench.look(each), bench.judge, asked).items():
                if np.isfinite(right).any():
                    place: dict[str, Coordinate] = {"steps": steps, "guidance": settings.own_guidance, "what": what}
                    rows += measured("accuracy", place, mean(right), count, groups, seed=seed, unit="share")
    path = bench.drawn(_unguided(settings, asked))
    bent = ratio((path.energy - path.length).clamp_min(0).numpy(), path.length.numpy())
    rows += measured("straightness", {}, bent, count, groups, seed=seed, unit="of E‖x1 − x0‖²")
    shown = range(min(settings.shown, count))
    return Found(rows, [row for each in wanted.values() for row in bench.keep("steps", each, shown)])


def apart(bench: Bench, a: Wanted, b: Wanted) -> tuple[np.ndarray, str]:
    """[N] distance of pictures one by one, and its unit: judge features where there is a judge, else latents."""
    if bench.judge is None:
        difference = bench.drawn(a).latents - bench.drawn(b).latents
        return difference.double().square().flatten(1).mean(dim=1).sqrt().numpy(), "latents, RMS"
    return feature_distance(bench.look(a), bench.look(b)), "judge features, RMS"


def feature_distance(a: Look, b: Look) -> np.ndarray:
    """[N] root mean square difference of judge features, picture by picture."""
    assert a.verdict is not None and b.verdict is not None
    found: np.ndarray = (a.verdict.features - b.verdict.features).double().square().mean(dim=1).sqrt().numpy()
    return found


SECTION = Section("steps", 1, plan, measure)
