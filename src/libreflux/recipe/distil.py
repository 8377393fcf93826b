"""The `distil` section of a recipe: what a student learns from its teacher, and by whom it is judged. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from libreflux.recipe.sections import DataSource, Real, Section, SigmaSpec, Whole


class AdversarialSpec(Section):
    """The adversary: heads on the teacher's own features, which tell the student's pictures from those of `data`."""

    blocks: tuple[Annotated[Whole, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="numbers of the blocks, from 0, double ones first, behind which a head sees the image's tokens; "
        "default: five, evenly spread",
    )
    width: Whole = Field(default=128, ge=4, le=4096, description="channels inside a head")
    learning_rate: Real = Field(default=2e-4, gt=0, le=1000, description="learning rate of the heads, the same always")
    rungs: tuple[Annotated[Real, Field(gt=0, le=1000)], ...] | None = Field(
        default=None,
        min_length=1,
        description="weights of the student's steps, from pure noise on: how often training draws each, in the place "
        "of sigmas; default: pure noise in half of the draws, the others alike",
    )
    penalty: Real = Field(
        default=0.01,
        ge=0,
        description="weight of the squared gradient of each head by its own input features, on pictures of data (R1); "
        "more holds the heads back",
    )
    noise_mean: Real = Field(
        default=1.0, ge=-20, le=20, description="mean of logit(sigma) at which the heads see pictures; higher: noisier"
    )
    noise_std: Real = Field(default=1.0, ge=0.01, le=100, description="standard deviation of that logit(sigma)")
    reconstruction: Real = Field(
        default=0.0,
        ge=0,
        description="weight of plain flow matching on data beside the adversary: steadier, and less sharp; 0: none",
    )
    warmup: Whole = Field(
        default=0, ge=0, description="first steps, in which only the less noisy half of the ladder is drawn"
    )

    @field_validator("blocks")
    @classmethod
    def _no_twice(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("the same block is given twice")
        return value


class DistilSpec(Section):
    """What the student learns from its teacher, the base without the adapter."""

    guidance: Real = Field(
        default=1.0, gt=0, le=100, description="classifier-free guidance of the teacher, baked into the student"
    )
    steps: Annotated[Whole, Field(ge=1, le=1000)] | None = Field(
        default=None, description="steps the student is to draw in; default: the teacher's velocity at any sigma"
    )
    substeps: Whole = Field(default=2, ge=2, le=1000, description="steps of the teacher to one of the student's")
    adversarial: AdversarialSpec | None = Field(
        default=None,
        description="learn from an adversary instead: data then holds the teacher's own pictures, drawn with guidance; "
        "default: regress the teacher's velocity",
    )

    @field_validator("adversarial", mode="before")
    @classmethod
    def _no_empty_section(cls, value: Any) -> Any:
        if value is None:  # `adversarial:` with nothing behind it
            raise ValueError("it is empty: write adversarial: {} for an adversary by its defaults, or leave it out")
        return value

    @model_validator(mode="after")
    def _of_use(self) -> DistilSpec:
        # By value: a resolved recipe, which a run keeps and reads again, has every key.
        other_substeps = self.substeps != type(self).model_fields["substeps"].default
        if self.steps is None and other_substeps:
            raise ValueError("substeps is for steps, which is not set")
        if self.adversarial is not None:
            self._adversarial_alone(other_substeps)
        elif self.steps is None and self.guidance == 1:
            raise ValueError("without steps and at guidance 1 the teacher is the student: set one of them")
        return self

    def _adversarial_alone(self, other_substeps: bool) -> None:
        if self.steps is None:
            raise ValueError("adversarial needs steps, those that the student is to draw in, e.g. 4")
        if self.guidance != 1:
            raise ValueError("guidance does nothing under adversarial: draw data's pictures with it, and remove it")
        if other_substeps:
            raise ValueError("substeps does nothing under adversarial; remove it")
        for name in ("warmup", "rungs"):
            if self.steps == 1 and getattr(self.adversarial, name):
                raise ValueError(f"adversarial.{name} does nothing with one step; remove it")
        rungs = self.adversarial and self.adversarial.rungs
        if rungs and len(rungs) != self.steps:
            raise ValueError(f"adversarial.rungs has {len(rungs)} weights for steps {self.steps}: give one for each")

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an adversary as versions wrote it that knew none: runs are told apart by these bytes."""
        tree: dict[str, Any] = handler(self)
        if self.adversarial is None:
            tree.pop("adversarial", None)
        return tree


def refuse_faults(
    objective: str, distil: DistilSpec | None, data: Sequence[DataSource], steps: int, sigmas: SigmaSpec
) -> None:
    """Raises ValueError for keys of a recipe that do not go with its `distil` section."""
    if (objective == "distil") != (distil is not None):
        raise ValueError("objective: distil and a distil section go together, e.g. distil: {guidance: 3}")
    if objective == "distil" and any(source.regularisation for source in data):
        raise ValueError("objective: distil keeps to the base already: leave out regularisation")
    adversarial = None if distil is None else distil.adversarial
    if adversarial is not None and sigmas != SigmaSpec():
        raise ValueError("sigmas does nothing under distil.adversarial, where rungs weighs the steps; remove it")
    if adversarial is not None and adversarial.warmup >= steps:
        told = f"distil.adversarial.warmup {adversarial.warmup} would fill all of steps {steps}"
        raise ValueError(f"{told}, and the ladder's noisier half never be trained; shorten it")
