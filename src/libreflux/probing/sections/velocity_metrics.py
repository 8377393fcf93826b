"""Loss, calibration, what the prompt is worth, and response to prompt and negative, at held-out pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import mean_square
from libreflux.probing.metrics.bootstrap import mean, measured, ratio, root_ratio
from libreflux.probing.metrics.measures import Moments, Velocity, moments
from libreflux.probing.results import Coordinate, Measure
from libreflux.probing.section import Plan, Section, SectionResult
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt
from libreflux.probing.units import Over

TEXTS = ("caption", "empty", "other")
"""Each picture's own caption, the empty prompt, and another picture's caption in the negative prompt's place."""


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Three passes for every picture and sigma."""
    return Plan(passes=len(TEXTS) * settings.pictures * len(settings.sigmas))


@torch.no_grad()
def measure(context: ProbeContext) -> SectionResult:
    """`loss`, `slope`, `prompt_gain`, `guidance_response` and `negative` (of velocities)."""
    settings, captions = context.settings, context.held_out_captions()
    others, empty = other_captions(captions), context.held_out.empty_prompt()
    found: dict[str, list[Moments]] = {what: [] for what in TEXTS}
    gaps: dict[str, list[np.ndarray]] = {"caption": [], "other": []}
    done = 0
    for part in context.held_out.batches(settings.batch):
        count, latents = len(part), part.latents.to(context.transformer.device)
        texts = (part.text, empty.repeat(count), context.texts(others[done : done + count]))
        kept: dict[str, list[Tensor]] = {}
        for what, text in zip(TEXTS, texts, strict=True):
            field, kept[what] = keeping(context.velocity(text.to(latents.device)))
            found[what].append(moments(field, latents, part.sample_ids, settings.sigmas, seed=settings.seed))
        for what, rows in gaps.items():
            pairs = zip(kept[what], kept["empty"], strict=True)
            rows.append(np.stack([mean_square(a - b).numpy() for a, b in pairs], axis=1))
        done += count
    merged = {what: Moments.cat(parts) for what, parts in found.items()}
    response, negative = (np.concatenate(gaps[what]) for what in ("caption", "other"))
    return SectionResult(
        measures_of(merged["caption"], merged["empty"], response, negative, context.groups(captions), settings)
    )


def measures_of(
    caption: Moments,
    empty: Moments,
    response: np.ndarray,
    negative: np.ndarray,
    groups: dict[str, np.ndarray],
    settings: Settings,
) -> list[Measure]:
    """The measures from moments under caption and empty prompt.

    Args:
        response: [N, S], mean of (v_c − v_u)².
        negative: [N, S], mean of (v_n − v_u)² for another caption n.
    """
    count, seed, rows = len(caption), settings.seed, list[Measure]()
    over: Over = "pictures"
    for column, sigma in enumerate(caption.sigmas):
        for text, side in (("caption", caption), ("empty", empty)):
            at: dict[str, Coordinate] = {"sigma": sigma, "text": text}
            rows += measured("loss", at, mean(side.error[:, column]), count, groups, seed=seed, unit="MSE", over=over)
            slope = ratio(side.cross[:, column], side.power[:, column])
            rows += measured("slope", at, slope, count, groups, seed=seed, reference=1.0, over=over)
        at_sigma: dict[str, Coordinate] = {"sigma": sigma}
        gain = mean(empty.error[:, column] - caption.error[:, column])
        rows += measured("prompt_gain", at_sigma, gain, count, groups, seed=seed, unit="MSE", over=over)
        relative = root_ratio(response[:, column], caption.power[:, column])
        rows += measured("guidance_response", at_sigma, relative, count, groups, seed=seed, unit="of ‖v_c‖", over=over)
    moved = root_ratio(negative.mean(axis=1), response.mean(axis=1))
    rows += measured(
        "negative", {"what": "velocity"}, moved, count, groups, seed=seed, unit="of ‖v_c − v_u‖", over=over
    )
    return rows


def keeping(velocity: Velocity) -> tuple[Velocity, list[Tensor]]:
    """A velocity, and the list that every value it gives is put into."""
    kept: list[Tensor] = []

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(velocity(x, sigma))
        return kept[-1]

    return field, kept


def other_captions(captions: Sequence[str]) -> list[str]:
    """For each caption the next one that differs, cyclically; itself where all are alike."""
    count = len(captions)
    turns = ([captions[(index + step) % count] for step in range(1, count)] for index in range(count))
    return [next((other for other in turn if other != own), own) for own, turn in zip(captions, turns, strict=True)]


SECTION = Section("pictures", 1, plan, measure)
