"""Whether a picture keeps away from what its negative prompt names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from libreflux.probing.context import Bench
from libreflux.probing.drawing import Wanted
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.metrics.image_stats import log_probability
from libreflux.probing.results import Measure
from libreflux.probing.section import Found, Plan, Section, prompted
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import Asked

KINDS = ("colour", "subject")


def open_prompt(one: Asked, kind: str) -> str:
    """A prompt that leaves its colour or its subject to the model: "a fox", "blue background, emoji"."""
    return one.text.rpartition(" on ")[0].rstrip(",") if kind == "colour" else f"{one.colour} background, emoji"


def negative_of(name: str, kind: str) -> str:
    """The negative prompt that names a colour or a subject."""
    return f"{name} background" if kind == "colour" else name


def texts(asked: Sequence[Asked], subjects: Collection[str], colours: Collection[str]) -> list[str]:
    """Every text that the section may need besides the prompts."""
    if not labelled(asked):
        return []
    named = {"colour": colours, "subject": subjects}
    opened = [open_prompt(one, kind) for kind in KINDS for one in asked]
    return list(dict.fromkeys([*opened, *(negative_of(name, kind) for kind in KINDS for name in named[kind])]))


def labelled(asked: Sequence[Asked]) -> bool:
    """Whether every prompt names a known subject and colour, so that a judge can say what came of it."""
    return bool(asked) and all(one.subject and one.colour for one in asked)


def plan(settings: Settings, asked: Sequence[Asked]) -> Plan:
    """Some prompts without and with negative prompts; the latter are known when the former are drawn."""
    chosen = asked[: settings.negative_prompts]
    plain = _plain(settings, chosen, KINDS if labelled(chosen) else KINDS[:0])
    return Plan(plain, sum(each.passes for each in plain))


def _plain(settings: Settings, chosen: Sequence[Asked], kinds: Sequence[str]) -> list[Wanted]:
    whole = prompted(settings, chosen, settings.negative_guidance, settings.draw_steps)
    if not kinds:
        return [whole]
    opened = [tuple(open_prompt(one, kind) for one in chosen) for kind in kinds]
    return [Wanted(each, whole.seeds, whole.guidance, whole.steps) for each in opened]


def measure(bench: Bench) -> Found:
    """`negative`: the change of the judge's log-probability of what is named, far below 0 where negatives work.

    Named is the colour or subject that the picture had without it, under a prompt that leaves it open.
    """
    settings, rows, pictures = bench.settings, list[Measure](), []
    chosen = bench.asked[: settings.negative_prompts]
    shown = range(min(settings.shown, len(chosen)))
    if bench.judge is None or not labelled(chosen):
        [plain] = _plain(settings, chosen, ())
        others = (*plain.prompts[1:], plain.prompts[0])
        return Found([], [*bench.keep("negative", plain, shown), *bench.keep("negative", _but(plain, others), shown)])
    for kind, plain in zip(KINDS, _plain(settings, chosen, KINDS), strict=True):
        names = bench.judge.subjects if kind == "subject" else bench.judge.colours
        before = bench.look(plain)
        assert before.verdict is not None
        logs = before.verdict.subjects if kind == "subject" else before.verdict.colours
        guess = [names[best] for best in logs.argmax(1).tolist()]
        against = _but(plain, tuple(negative_of(name, kind) for name in guess))
        after = bench.look(against)
        change = log_probability(after, bench.judge, kind, guess) - log_probability(before, bench.judge, kind, guess)
        groups = bench.groups([one.text for one in chosen])
        if kind == "subject":  # the prompts name none
            groups = {"all": groups["all"]}
        rows += measured(
            "negative", {"what": kind}, mean(change), len(chosen), groups, seed=settings.seed, unit="log-probability"
        )
        pictures += [*bench.keep("negative", plain, shown), *bench.keep("negative", against, shown)]
    return Found(rows, pictures)


def _but(plain: Wanted, negatives: tuple[str, ...]) -> Wanted:
    return Wanted(plain.prompts, plain.seeds, plain.guidance, plain.steps, negatives)


SECTION = Section("negative", 1, plan, measure)
