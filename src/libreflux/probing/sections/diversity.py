"""How far apart pictures of one prompt are that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.bootstrap import PairMean, measured, shared_seeds
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import SEED_STRIDE, Plan, Section, SectionResult
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Some prompts from several seeds at each scale."""
    return Plan([_batch(settings, prompts, scale) for scale in settings.diversity_guidance])


def _batch(settings: Settings, prompts: Sequence[ParsedPrompt], scale: float) -> PictureBatch:
    """The seeds are the same for every prompt: those of a user who tries prompts."""
    chosen, count = prompts[: settings.diversity_prompts], settings.diversity_seeds
    first = settings.seed * SEED_STRIDE
    texts = tuple(one.text for one in chosen for _ in range(count))
    return PictureBatch(texts, tuple(range(first, first + count)) * len(chosen), scale, settings.draw_steps)


def measure(context: ProbeContext) -> SectionResult:
    """`diversity` over seeds in latents and, with a judge, in its features.

    The seeds are the same for all prompts. Its intervals are over both: prompts and seeds are resampled.
    """
    settings, rows, pictures = context.settings, list[Measure](), []
    chosen = context.prompts[: settings.diversity_prompts]
    groups = context.groups([one.text for one in chosen])
    seeds = shared_seeds(settings.diversity_seeds, seed=settings.seed)
    for scale in settings.diversity_guidance:
        batch = _batch(settings, context.prompts, scale)
        spaces = {"latents": context.drawn(batch).latents}
        verdict = context.look(batch).verdict
        if verdict is not None:
            spaces["features"] = verdict.features
        for kind, points in spaces.items():
            apart = PairMean(pairwise(points.unflatten(0, (len(chosen), settings.diversity_seeds))), seeds)
            at: dict[str, Coordinate] = {"guidance": scale, "kind": kind}
            unit = f"{'judge features' if kind == 'features' else kind}, RMS"
            rows += measured("diversity", at, apart, len(chosen), groups, seed=settings.seed, unit=unit)
        shown = range(min(settings.shown, len(chosen)) * settings.diversity_seeds)
        pictures += context.keep("seeds", batch, shown)
    return SectionResult(rows, pictures)


def mean_pairwise(points: Tensor) -> np.ndarray:
    """[P] fp64: mean root mean square difference of the pairs among S points, of points [P, S, …]."""
    apart = pairwise(points)
    seeds = apart.shape[1]
    found: np.ndarray = apart.sum(axis=(1, 2)) / (seeds * (seeds - 1))
    return found


def pairwise(points: Tensor) -> np.ndarray:
    """[P, S, S] fp64: root mean square difference of every two among S points, of points [P, S, …]."""
    points = points.double().flatten(2)
    squares = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / points.shape[-1] ** 0.5
    found: np.ndarray = squares.numpy()
    return found


SECTION = Section("diversity", 2, plan, measure, drawn=True)
