"""How far apart pictures of one prompt are that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from libreflux.probing.context import Bench
from libreflux.probing.drawing import Wanted
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import SEED_STRIDE, Found, Plan, Section
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import Asked


def plan(settings: Settings, asked: Sequence[Asked]) -> Plan:
    """Some prompts from several seeds at each scale."""
    return Plan([_wanted(settings, asked, scale) for scale in settings.diversity_guidance])


def _wanted(settings: Settings, asked: Sequence[Asked], scale: float) -> Wanted:
    """The seeds are the same for every prompt: those of a user who tries prompts."""
    chosen, count = asked[: settings.diversity_prompts], settings.diversity_seeds
    first = settings.seed * SEED_STRIDE
    prompts = tuple(one.text for one in chosen for _ in range(count))
    return Wanted(prompts, tuple(range(first, first + count)) * len(chosen), scale, settings.draw_steps)


def measure(bench: Bench) -> Found:
    """`diversity` over seeds in latents and, with a judge, in its features."""
    settings, rows, pictures = bench.settings, list[Measure](), []
    chosen = bench.asked[: settings.diversity_prompts]
    groups = bench.groups([one.text for one in chosen])
    for scale in settings.diversity_guidance:
        wanted = _wanted(settings, bench.asked, scale)
        spaces = {"latents": bench.drawn(wanted).latents}
        verdict = bench.look(wanted).verdict
        if verdict is not None:
            spaces["features"] = verdict.features
        for kind, points in spaces.items():
            apart = mean_pairwise(points.unflatten(0, (len(chosen), settings.diversity_seeds)))
            at: dict[str, Coordinate] = {"guidance": scale, "kind": kind}
            unit = f"{'judge features' if kind == 'features' else kind}, RMS"
            rows += measured("diversity", at, mean(apart), len(chosen), groups, seed=settings.seed, unit=unit)
        shown = range(min(settings.shown, len(chosen)) * settings.diversity_seeds)
        pictures += bench.keep("seeds", wanted, shown)
    return Found(rows, pictures)


def mean_pairwise(points: Tensor) -> np.ndarray:
    """[P] fp64: mean root mean square difference of the pairs among S points, of points [P, S, …]."""
    points = points.double().flatten(2)
    squares = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[-1] ** 0.5
    seeds = points.shape[1]
    found: np.ndarray = (squares.sum(dim=(1, 2)) / (seeds * (seeds - 1))).numpy()
    return found


SECTION = Section("diversity", 1, plan, measure)
