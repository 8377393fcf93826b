"""Options of guidance beyond its scale, as `generate` and `grid` share them; what does nothing is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from libreflux.errors import OptionError
from libreflux.printing import counted
from libreflux.sample.checks import check_values, first_steps_argument
from libreflux.sample.rules import nag_of, rule_of
from libreflux.values import is_guided

if TYPE_CHECKING:
    from libreflux.model.facts import Facts

OF_APG = ("apg_eta", "apg_radius", "apg_momentum")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How guidance is done, see the page on guidance.

    Attributes:
        guidance_rule: "cfg", "apg" (adaptive projected guidance) or "cfg-zero" (CFG-Zero*).
        apg_eta: how much APG keeps of what is parallel to the picture, which saturates: 0 none, 1 all; None is 0.
        apg_radius: the largest norm of APG's update, over all numbers of the latents; None is no limit.
        apg_momentum: of APG's updates, between -1 and 1; below 0 takes back what earlier steps added; None is -0.5.
        zero_init: first steps (a count) of CFG-Zero* that stand still, and cost no pass.
        nag: scale of normalized attention guidance, by the negative prompt (the empty one too) and beside any guidance
            scale; 0 is none, 4 is usual.
        nag_tau: how many times its plain norm guided attention may have; None is 2.5.
        nag_alpha: the share of guided attention, 0 to 1; None is 0.25.
        first_steps_from: "MODEL" or "MODEL:N": another model, such as the base of a distilled one, draws the first N
            steps (1) of the ladder. Adapters are not put on it.
        first_steps_guidance: its guidance scale; None is its own.
    """

    guidance_rule: Literal["cfg", "apg", "cfg-zero"] = "cfg"
    apg_eta: float | None = None
    apg_radius: float | None = None
    apg_momentum: float | None = None
    zero_init: int = 0
    nag: float = 0.0
    nag_tau: float | None = None
    nag_alpha: float | None = None
    first_steps_from: str | None = None
    first_steps_guidance: float | None = None


def check_rule(options: GuidanceOptions) -> None:
    """Raises OptionError for values out of range, and for numbers that the rule does not read."""
    rule_of(options)
    given = [name for name in OF_APG if getattr(options, name) is not None]
    if given and options.guidance_rule != "apg":
        raise OptionError("is read by `guidance_rule` apg alone", given[0], hint="remove it, or add that")


def check_zero_init(options: GuidanceOptions, steps: int) -> None:
    """Raises OptionError where steps that stand still leave none of so many."""
    rule_of(options).check_steps(steps)


def rule_fields(options: GuidanceOptions, guidance: float) -> dict[str, Any]:
    """What a picture's record says of the rule, with the numbers that were not given; nothing without guidance."""
    if not is_guided(guidance) or options.guidance_rule == "cfg":
        return {}
    fields: dict[str, Any] = {"guidance_rule": options.guidance_rule}
    if options.guidance_rule == "cfg-zero":
        return {**fields, "zero_init": int(options.zero_init)}
    rule = rule_of(options)
    radius = rule.apg_radius
    numbers = {"apg_eta": float(rule.apg_eta), "apg_momentum": float(rule.apg_momentum)}
    return {**fields, **numbers, "apg_radius": None if radius is None else float(radius)}


def check_first_steps(options: GuidanceOptions, steps: int | None) -> None:
    """Raises OptionError for first steps that are out of range, or leave none of `steps`; None is not known yet."""
    check_values({"guidance_scale": options.first_steps_guidance}, {"guidance_scale": "first_steps_guidance"})
    if options.first_steps_from is None:
        if options.first_steps_guidance is not None:
            hint = "add that, or remove it"
            raise OptionError("has no effect without `first_steps_from`", "first_steps_guidance", hint=hint)
        return
    count = first_steps_argument(options.first_steps_from)[1]
    if count < 1:
        raise OptionError("draws no step", "first_steps_from", hint="use MODEL:1, or remove it")
    if 0 < options.zero_init <= count:
        what = f"has no effect: `first_steps_from` draws the first {counted(count, 'step')}"
        raise OptionError(what, "zero_init", hint=f"remove it, or use more than {count}")
    if steps is not None and count >= steps:
        hint = f"use MODEL:{steps - 1} at most" if steps > 1 else "use more `steps`"
        raise OptionError(f"leaves none of {counted(steps, 'step')} to the model", "first_steps_from", hint=hint)


def first_model(options: GuidanceOptions) -> str | None:
    """Who draws the first steps; None is no other model."""
    return None if options.first_steps_from is None else first_steps_argument(options.first_steps_from)[0]


def first_fields(options: GuidanceOptions, facts: Facts | None) -> dict[str, Any]:
    """What a picture's record says of its first steps.

    Args:
        options: of the picture.
        facts: of the other model.
    """
    if options.first_steps_from is None or facts is None:
        return {}
    model, count = first_steps_argument(options.first_steps_from)
    given = options.first_steps_guidance
    return {
        "first_steps_from": f"{model}:{count}",
        "first_steps_guidance": float(facts.cfg_scale if given is None else given),
    }


def reads_negative(options: GuidanceOptions, facts: Facts | None = None) -> bool:
    """Whether the negative prompt does something without the model's own guidance; `facts` of who draws first."""
    if options.nag:
        return True
    if options.first_steps_from is None:
        return False
    given = options.first_steps_guidance
    scale = given if given is not None or facts is None else facts.cfg_scale
    return scale is None or is_guided(scale)


def check_nag(options: GuidanceOptions, compile: str) -> None:
    """Raises OptionError for values out of range, numbers that nothing reads, or compiled blocks."""
    nag = nag_of(options)
    for name in ("nag_tau", "nag_alpha"):
        if not nag.nag and getattr(options, name) is not None:
            raise OptionError("has no effect without `nag`", name, hint="add `nag` 4, or remove it")
    if nag.nag and not nag.nag_alpha:
        raise OptionError("of 0 leaves `nag` without effect", "nag_alpha", hint="use 0.25, or remove both")
    refuse_compiled(nag.nag, compile)


def refuse_compiled(nag: float, compile: str) -> None:
    """Raises OptionError for guidance within attention beside compiled blocks."""
    if nag and compile == "on":
        raise OptionError("does not go with `nag`", "compile", value="on", hint="set `compile` off")


def nag_fields(options: GuidanceOptions) -> dict[str, Any]:
    """What a picture's record says of guidance within attention; nothing without."""
    nag = nag_of(options)
    if not nag.nag:
        return {}
    return {"nag": float(nag.nag), "nag_tau": float(nag.nag_tau), "nag_alpha": float(nag.nag_alpha)}
