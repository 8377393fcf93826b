"""Options of guidance beyond its scale, as the verbs that draw share them."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import typer


class Rule(enum.StrEnum):
    """`--guidance-rule`."""

    cfg = "cfg"
    apg = "apg"
    cfg_zero = "cfg-zero"

    @property
    def as_value(self) -> Literal["cfg", "apg", "cfg-zero"]:
        """As workflows take it."""
        return self.value


RuleOption = Annotated[
    Rule,
    typer.Option(
        help="What guided steps make of the two velocities: cfg; apg, adaptive projected guidance; cfg-zero, CFG-Zero*."
    ),
]
ApgEta = Annotated[
    float | None,
    typer.Option(
        metavar="ETA",
        help="How much apg keeps of what is parallel to the picture, which saturates: 1 all; default: 0, none.",
        show_default=False,
    ),
]
ApgRadius = Annotated[
    float | None,
    typer.Option(
        metavar="R", help="Largest norm of apg's update, over all latents; default: no limit.", show_default=False
    ),
]
ApgMomentum = Annotated[
    float | None,
    typer.Option(
        metavar="M", help="Of apg's updates; below 0 takes back earlier ones; default: -0.5.", show_default=False
    ),
]
ZeroInit = Annotated[int, typer.Option(min=0, help="First steps (a count) of cfg-zero that stand still.")]
FirstStepsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL:N",
        help="Another model, such as the base of a distilled one, draws the first N steps, without adapters.",
        show_default=False,
    ),
]
FirstStepsGuidance = Annotated[
    float | None,
    typer.Option(min=0, metavar="G", help="Its guidance scale; default: its own.", show_default=False),
]
NagScale = Annotated[
    float,
    typer.Option(
        min=0,
        help="Scale of normalized attention guidance by the negative prompt, for models of few steps: 0 none, 4 usual.",
    ),
]
NagTau = Annotated[
    float | None,
    typer.Option(
        metavar="TAU",
        help="How many times its plain norm guided attention may have; default: 2.5.",
        show_default=False,
    ),
]
NagAlpha = Annotated[
    float | None,
    typer.Option(metavar="ALPHA", help="Share of guided attention, 0 to 1; default: 0.25.", show_default=False),
]
