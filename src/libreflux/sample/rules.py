"""How the two velocities of a guided step become one: which rule, and its numbers. Loads no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from libreflux.errors import OptionError
from libreflux.sample.checks import check_values

Rule = Literal["cfg", "apg", "cfg-zero"]


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """A rule of guidance, with its numbers.

    Attributes:
        guidance_rule: "cfg", "apg" or "cfg-zero", see `flow.guidance`.
        apg_eta: how much APG keeps of what is parallel to the picture; 1 is all.
        apg_radius: the largest norm of APG's update; None is no limit.
        apg_momentum: of APG's updates from step to step; 0 is none.
        zero_init: first steps (a count) of CFG-Zero* that stand still.

    Raises:
        OptionError: a value out of range, or one that this rule does not read.
    """

    guidance_rule: Rule = "cfg"
    apg_eta: float = 0.0
    apg_radius: float | None = None
    apg_momentum: float = -0.5
    zero_init: int = 0

    def __post_init__(self) -> None:
        check_values(
            {
                "guidance_rule": self.guidance_rule,
                "apg_eta": self.apg_eta,
                "apg_radius": self.apg_radius,
                "apg_momentum": self.apg_momentum,
                "zero_init": self.zero_init,
            }
        )
        readers = {"apg_eta": "apg", "apg_radius": "apg", "apg_momentum": "apg", "zero_init": "cfg-zero"}
        for field in dataclasses.fields(self):
            rule = readers.get(field.name, self.guidance_rule)
            if rule != self.guidance_rule and getattr(self, field.name) != field.default:
                raise OptionError(f"is read by `guidance_rule` {rule} alone", field.name, hint="remove it, or add that")

    def check_steps(self, steps: int) -> None:
        """Raises OptionError where no step would be left."""
        if self.zero_init >= steps:
            hint = f"use at most {steps - 1}" if steps > 1 else "remove it, or use more `steps`"
            raise OptionError(f"leaves no step of {steps}", "zero_init", hint=hint)


def rule_of(told: Any) -> GuidanceRule:
    """The rule of a picture's record, or of options, which have these fields; a number that is None is the rule's own.

    Raises:
        OptionError: see `GuidanceRule`.
    """
    numbers = {name: getattr(told, name) for name in ("apg_eta", "apg_radius", "apg_momentum")}
    given = {name: value for name, value in numbers.items() if value is not None}
    return GuidanceRule(guidance_rule=told.guidance_rule, zero_init=told.zero_init, **given)


@dataclass(frozen=True, kw_only=True)
class Nag:
    """Normalized attention guidance, see `flow.guidance.nag`.

    Attributes:
        nag: its scale; 0 is none.
        nag_tau: how many times the norm of the plain attention the guided one may have.
        nag_alpha: the share of the guided one.

    Raises:
        OptionError: a value out of range.
    """

    nag: float = 0.0
    nag_tau: float = 2.5
    nag_alpha: float = 0.25

    def __post_init__(self) -> None:
        check_values({"nag": self.nag, "nag_tau": self.nag_tau, "nag_alpha": self.nag_alpha})


def nag_of(told: Any) -> Nag:
    """That of a picture's record, or of options; a number that is None is the usual one.

    Raises:
        OptionError: see `Nag`.
    """
    given = {name: getattr(told, name) for name in ("nag_tau", "nag_alpha") if getattr(told, name) is not None}
    return Nag(nag=told.nag, **given)
