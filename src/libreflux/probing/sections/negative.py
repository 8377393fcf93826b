"""Whether a picture keeps away from what its negative prompt names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from libreflux.probing.context import ProbeContext
from libreflux.probing.drawing import PictureBatch
from libreflux.probing.judges import COLOUR, SUBJECT
from libreflux.probing.metrics.bootstrap import mean, measured
from libreflux.probing.metrics.image_stats import log_probability
from libreflux.probing.results import Measure
from libreflux.probing.section import Plan, Section, SectionResult, prompted
from libreflux.probing.settings import Settings
from libreflux.probing.subjects import ParsedPrompt

KINDS = (COLOUR, SUBJECT)


def open_prompt(one: ParsedPrompt, kind: str) -> str:
    """A prompt that leaves its colour or its subject to the model: "a fox", "blue background, emoji"."""
    return one.text.rpartition(" on ")[0].rstrip(",") if kind == COLOUR else f"{one.colour} background, emoji"


def negative_of(name: str, kind: str) -> str:
    """The negative prompt that names a colour or a subject."""
    return f"{name} background" if kind == COLOUR else name


def texts(prompts: Sequence[ParsedPrompt], subjects: Collection[str], colours: Collection[str]) -> list[str]:
    """Every text that the section may need besides the prompts."""
    if not labelled(prompts):
        return []
    named = {COLOUR: colours, SUBJECT: subjects}
    opened = [open_prompt(one, kind) for kind in KINDS for one in prompts]
    return list(dict.fromkeys([*opened, *(negative_of(name, kind) for kind in KINDS for name in named[kind])]))


def labelled(prompts: Sequence[ParsedPrompt]) -> bool:
    """Whether every prompt names a known subject and colour, so that a judge can say what came of it."""
    return bool(prompts) and all(one.subject and one.colour for one in prompts)


def plan(settings: Settings, prompts: Sequence[ParsedPrompt]) -> Plan:
    """Some prompts without and with negative prompts; the latter are known when the former are drawn."""
    chosen = prompts[: settings.negative_prompts]
    plain = _plain(settings, chosen, KINDS if labelled(chosen) else KINDS[:0])
    return Plan(plain, sum(each.passes for each in plain))


def _plain(settings: Settings, chosen: Sequence[ParsedPrompt], kinds: Sequence[str]) -> list[PictureBatch]:
    whole = prompted(settings, chosen, settings.negative_guidance, settings.draw_steps)
    if not kinds:
        return [whole]
    opened = [tuple(open_prompt(one, kind) for one in chosen) for kind in kinds]
    return [PictureBatch(each, whole.seeds, whole.guidance, whole.steps) for each in opened]


def measure(context: ProbeContext) -> SectionResult:
    """`negative`: the change of the judge's log-probability of what is named, far below 0 where negatives work.

    Named is the colour or subject that the picture had without it, under a prompt that leaves it open.
    """
    settings, rows, pictures = context.settings, list[Measure](), []
    chosen = context.prompts[: settings.negative_prompts]
    shown = range(min(settings.shown, len(chosen)))
    if context.judge is None or not labelled(chosen):
        [plain] = _plain(settings, chosen, ())
        others = (*plain.prompts[1:], plain.prompts[0])
        return SectionResult(
            [], [*context.keep("negative", plain, shown), *context.keep("negative", _but(plain, others), shown)]
        )
    for kind, plain in zip(KINDS, _plain(settings, chosen, KINDS), strict=True):
        names = context.judge.questions[kind]
        before = context.look(plain)
        assert before.verdict is not None
        guess = [names[best] for best in before.verdict.answers[kind].argmax(1).tolist()]
        against = _but(plain, tuple(negative_of(name, kind) for name in guess))
        after = context.look(against)
        change = log_probability(after, context.judge, kind, guess) - log_probability(
            before, context.judge, kind, guess
        )
        groups = context.groups([one.text for one in chosen])
        if kind == SUBJECT:  # the prompts name none
            groups = {"all": groups["all"]}
        rows += measured(
            "negative", {"what": kind}, mean(change), len(chosen), groups, seed=settings.seed, unit="log-probability"
        )
        pictures += [*context.keep("negative", plain, shown), *context.keep("negative", against, shown)]
    return SectionResult(rows, pictures)


def _but(plain: PictureBatch, negatives: tuple[str, ...]) -> PictureBatch:
    return PictureBatch(plain.prompts, plain.seeds, plain.guidance, plain.steps, negatives)


SECTION = Section("negative", 1, plan, measure, drawn=True)
