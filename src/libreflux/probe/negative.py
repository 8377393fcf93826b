"""Whether a picture keeps away from what its negative prompt names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from libreflux.probe.bench import Bench
from libreflux.probe.bootstrap import mean, measured
from libreflux.probe.drawing import Wanted
from libreflux.probe.looks import log_probability
from libreflux.probe.results import Measure
from libreflux.probe.section import Found, Plan, Section, prompted
from libreflux.probe.settings import Settings
from libreflux.probe.subjects import Asked

KINDS = ("colour", "subject")


def negatives(asked: Sequence[Asked], what: str) -> tuple[str, ...]:
    """Negative prompts that name each prompt's own colour or subject; of prompts without, the next prompt."""
    named = {"colour": "{} background", "subject": "{}"}[what]
    texts = [getattr(one, what) for one in asked]
    following = [one.text for one in (*asked[1:], *asked[:1])]
    return tuple(named.format(text) if text else other for text, other in zip(texts, following, strict=True))


def plan(settings: Settings, asked: Sequence[Asked]) -> Plan:
    """Some prompts with and without negative prompts."""
    return Plan(list(_wanted(settings, asked).values()))


def _wanted(settings: Settings, asked: Sequence[Asked]) -> dict[str, Wanted]:
    chosen = asked[: settings.negative_prompts]
    plain = prompted(settings, chosen, settings.negative_guidance, settings.draw_steps)
    kinds = KINDS if all(one.subject and one.colour for one in chosen) else KINDS[:1]
    told = {kind: negatives(chosen, kind) for kind in kinds}
    return {
        "without": plain,
        **{kind: Wanted(plain.prompts, plain.seeds, plain.guidance, plain.steps, told[kind]) for kind in kinds},
    }


def measure(bench: Bench) -> Found:
    """`negative`: by how much it lowers (below 0) the judge's log-probability of what it names, at one guidance."""
    settings, rows, pictures = bench.settings, list[Measure](), []
    chosen = bench.asked[: settings.negative_prompts]
    groups, wanted = bench.groups([one.text for one in chosen]), _wanted(settings, bench.asked)
    for kind, each in wanted.items():
        if kind != "without" and bench.judge is not None:
            names = bench.judge.subjects if kind == "subject" else bench.judge.colours
            known = [i for i, one in enumerate(chosen) if getattr(one, kind) in names]
            change = np.full(len(chosen), np.nan)
            if known:
                change[known] = _change(bench, wanted["without"], each, chosen, kind, known)
                told = measured(
                    "negative", {"what": kind}, mean(change), len(chosen), groups,
                    seed=settings.seed, unit="log-probability",
                )  # fmt: skip
                rows += told
        pictures += bench.keep("negative", each, range(min(settings.shown, len(chosen))))
    return Found(rows, pictures)


def _change(
    bench: Bench, without: Wanted, negated: Wanted, asked: Sequence[Asked], kind: str, known: Sequence[int]
) -> np.ndarray:
    assert bench.judge is not None
    judge, names = bench.judge, [getattr(asked[i], kind) for i in known]
    before, after = (bench.look(each).index(known) for each in (without, negated))
    return log_probability(after, judge, kind, names) - log_probability(before, judge, kind, names)


SECTION = Section("negative", 1, plan, measure)
