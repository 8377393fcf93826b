"""What was drawn of the texts that prompts quote: the share of their letters that is right, by guidance and steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.metrics.bootstrap import Groups, mean, measured, ratio
from libreflux.probing.metrics.letters import ReadLetters, quoted, read_letters
from libreflux.probing.results import Coordinate, Measure, Picture
from libreflux.probing.section import Plan, Section, SectionResult, prompted
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt

PURPOSE = "letters"
LINE = " / "
"""Between the lines that were read."""


@dataclass(frozen=True)
class Reading:
    """What was read in a picture, and how much of what its prompt quotes is right."""

    lines: tuple[str, ...]
    letters: ReadLetters


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Every prompt at every scale and number of steps; each picture that is read counts as one sample."""
    batches = [*_by_scale(settings, prompts).values(), *_by_steps(settings, prompts).values()]
    return Plan(batches, len(batches) * len(quoting([one.text for one in prompts])))


def quoting(texts: Sequence[str]) -> list[int]:
    """Which of these prompts or captions quote a text."""
    return [index for index, text in enumerate(texts) if quoted(text)]


def _by_scale(settings: Settings, prompts: Sequence[ParsedPrompt]) -> dict[float, PictureBatch]:
    return {scale: prompted(settings, prompts, scale, settings.draw_steps) for scale in settings.guidance}


def _by_steps(settings: Settings, prompts: Sequence[ParsedPrompt]) -> dict[int, PictureBatch]:
    return {steps: prompted(settings, prompts, settings.own_guidance, steps) for steps in settings.steps}


def measure(context: ProbeContext) -> SectionResult:
    """`letters` and `letters_extra` by guidance and steps, and `held_out_letters`: what the reader makes of real text.

    The pictures that are kept are the best and the worst at the scale where most letters are right.
    """
    settings, prompts = context.settings, context.prompts
    chosen = quoting([one.text for one in prompts])
    groups = quoting_groups(context, [one.text for one in prompts])
    rows, scales = held_out(context), _by_scale(settings, prompts)
    by_scale = {scale: [*_read(context, batch, chosen)] for scale, batch in scales.items()}
    for scale, found in by_scale.items():
        rows += _rows(found, {"guidance": scale}, groups, settings, chosen)
    for steps, batch in _by_steps(settings, prompts).items():
        at: dict[str, Coordinate] = {"steps": steps, "guidance": settings.own_guidance}
        rows += _rows([*_read(context, batch, chosen)], at, groups, settings, chosen)
    best = max(by_scale, key=lambda scale: (np.mean(_shares(by_scale[scale])), -scale))
    return SectionResult(rows, _kept(context, scales[best], chosen, by_scale[best]))


def held_out(context: ProbeContext) -> list[Measure]:
    """`held_out_letters`: of real pictures that have been through the VAE, what the reader reads of their captions."""
    found, texts = list[Reading](), list[str]()
    for part in context.held_out.batches(context.settings.batch):
        found += [_reading(context, part.latents[index], part.captions[index]) for index in quoting(part.captions)]
        texts += part.captions
    shares, seed = _among(_shares(found), quoting(texts), len(texts)), context.settings.seed
    groups, unit = quoting_groups(context, texts), "share of letters"
    return measured("held_out_letters", {}, mean(shares), len(texts), groups, seed=seed, unit=unit, over="pictures")


def quoting_groups(context: ProbeContext, texts: Sequence[str]) -> Groups:
    """The subsets of the texts that quote something, as numbers among all of them."""
    chosen = np.array(quoting(texts), np.int64)
    return {subset: chosen[members] for subset, members in context.groups([texts[i] for i in chosen.tolist()]).items()}


def _among(values: np.ndarray, chosen: Sequence[int], count: int) -> np.ndarray:
    """[count]: values at their places, NaN at the others."""
    found = np.full(count, np.nan)
    found[list(chosen)] = values
    return found


def _read(context: ProbeContext, batch: PictureBatch, chosen: Sequence[int]) -> Iterator[Reading]:
    latents = context.drawn(batch).latents
    for row in chosen:
        yield _reading(context, latents[row], batch.prompts[row])
        context.advance(1)


def _reading(context: ProbeContext, latents: Tensor, prompt: str) -> Reading:
    assert context.reader is not None
    lines = context.reader.read(context.picture(latents))
    return Reading(tuple(lines), read_letters(quoted(prompt), lines))


def _shares(found: Sequence[Reading]) -> np.ndarray:
    return np.array([one.letters.share for one in found])


def _rows(
    found: Sequence[Reading], at: Mapping[str, Coordinate], groups: Groups, settings: Settings, chosen: Sequence[int]
) -> list[Measure]:
    count, seed, unit = settings.prompts, settings.seed, "share of letters"
    rows = measured("letters", at, mean(_among(_shares(found), chosen, count)), count, groups, seed=seed, unit=unit)
    extra, wanted = (
        np.nan_to_num(_among(np.array([getattr(one.letters, name) for one in found], float), chosen, count))
        for name in ("extra", "wanted")
    )
    unit = "letters for each that is asked for"
    return rows + measured("letters_extra", at, ratio(extra, wanted), count, groups, seed=seed, unit=unit)


def _kept(context: ProbeContext, batch: PictureBatch, chosen: Sequence[int], found: Sequence[Reading]) -> list[Picture]:
    """The best pictures, the best first, then the worst, the worst last."""
    order = np.argsort(-_shares(found), kind="stable").tolist()
    count = min(context.settings.shown, len(order) // 2)
    kept = list[Picture]()
    for index in [*order[:count], *order[len(order) - count :]]:
        one = found[index]
        told: dict[str, Coordinate] = {
            "text": LINE.join(quoted(batch.prompts[chosen[index]])),
            "read": LINE.join(one.lines),
            "letters": one.letters.share,
            "extra": one.letters.extra,
        }
        kept += context.keep(PURPOSE, batch, [chosen[index]], **told)
    return kept


SECTION = Section("letters", 2, plan, measure, setting="reader", drawn=True)
