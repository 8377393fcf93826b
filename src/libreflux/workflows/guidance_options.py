"""Options of guidance beyond its scale, as `generate` and `grid` share them; what does nothing is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from libreflux.errors import OptionError
from libreflux.sample.rules import rule_of

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
    """

    guidance_rule: Literal["cfg", "apg", "cfg-zero"] = "cfg"
    apg_eta: float | None = None
    apg_radius: float | None = None
    apg_momentum: float | None = None
    zero_init: int = 0


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
    if guidance <= 1 or options.guidance_rule == "cfg":
        return {}
    fields: dict[str, Any] = {"guidance_rule": options.guidance_rule}
    if options.guidance_rule == "cfg-zero":
        return {**fields, "zero_init": int(options.zero_init)}
    rule = rule_of(options)
    radius = rule.apg_radius
    numbers = {"apg_eta": float(rule.apg_eta), "apg_momentum": float(rule.apg_momentum)}
    return {**fields, **numbers, "apg_radius": None if radius is None else float(radius)}
