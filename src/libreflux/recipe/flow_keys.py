"""The keys of `objective: flow`: a target beyond the picture, and a penalty that holds the base. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from libreflux.recipe.sections import DataSource, Real, Section

FLOW_KEYS = ("guided_target", "hold_base")


class GuidedTargetSpec(Section):
    """A target that lies beyond the picture's, as seen from the model's own velocity under the empty prompt."""

    scale: Real = Field(
        ge=1,
        le=100,
        description="target = u + scale (target - u), u the model's velocity under the empty prompt; 1: off",
    )
    decay: Real = Field(
        default=0.0,
        ge=0,
        le=100,
        description="the scale falls with the noise level: 1 + (scale - 1) sigma^decay; 0: the same at all",
    )

    @property
    def neutral(self) -> bool:
        """Whether the target is the picture's own, without another pass."""
        return self.scale == 1

    @model_validator(mode="after")
    def _no_idle_key(self) -> GuidedTargetSpec:
        if self.neutral and self.decay:
            raise ValueError("decay does nothing at scale 1; remove it")
        return self


class HoldBaseSpec(Section):
    """A penalty for leaving the base's velocity, on the training pictures themselves."""

    weight: Real = Field(
        ge=0, le=1000, description="of the squared difference from the base's velocity, beside the loss; 0: off"
    )
    sigmas: tuple[Real, Real] | None = Field(
        default=None, description="lowest and highest noise level that it applies at, e.g. [0.5, 1]; default: all"
    )

    @property
    def neutral(self) -> bool:
        """Whether nothing is held, without another pass."""
        return self.weight == 0

    def applies(self, sigma: float) -> bool:
        """Whether a picture at this noise level is held."""
        return self.sigmas is None or self.sigmas[0] <= sigma <= self.sigmas[1]

    @field_validator("sigmas")
    @classmethod
    def _an_interval(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise ValueError("wanted two noise levels in [0, 1], the lower one first, such as [0.5, 1]")
        return value

    @model_validator(mode="after")
    def _no_idle_key(self) -> HoldBaseSpec:
        if self.neutral and self.sigmas is not None:
            raise ValueError("sigmas does nothing at weight 0; remove it")
        return self


def _not_empty(example: str) -> BeforeValidator:
    """Refuses a section with nothing behind its key: as good as left out, and not what was meant."""

    def check(value: Any) -> Any:
        if value is None:
            raise ValueError(f"it is empty: write {example}, or leave it out")
        return value

    return BeforeValidator(check)


GuidedTarget = Annotated[GuidedTargetSpec | None, _not_empty("{scale: 3}, {scale: 1} for none")]
HoldBase = Annotated[HoldBaseSpec | None, _not_empty("{weight: 0.2}, {weight: 0} for none")]


def refuse_idle(
    guided: GuidedTargetSpec | None, hold: HoldBaseSpec | None, objective: str, data: Sequence[DataSource]
) -> None:
    """Raises ValueError for keys that would do nothing in a recipe of this objective and these sources."""
    given = [key for key, spec in zip(FLOW_KEYS, (guided, hold), strict=True) if spec is not None]
    if not given:
        return
    told = f"{' and '.join(given)} {'does' if len(given) == 1 else 'do'} nothing"
    if objective != "flow":
        raise ValueError(f"{told} under objective: {objective}, which has a target of its own; remove it")
    trained = [source for source in data if not source.regularisation]
    if not trained:
        raise ValueError(f"{told} where all data is for regularisation; remove it")
    if guided is not None and all(source.caption_dropout == 1 for source in trained):
        raise ValueError(
            "guided_target does nothing where caption_dropout 1 drops every caption; remove one of the two"
        )


def as_ever(tree: dict[str, Any], *, neutral: bool = False) -> dict[str, Any]:
    """A recipe's tree as versions wrote it that knew none of `FLOW_KEYS`, where none is set.

    Runs are told apart by these bytes.

    Args:
        tree: as serialised; it is changed.
        neutral: whether a key with a neutral value goes too, since it changes no number.
    """
    for key, off in (("guided_target", {"scale": 1}), ("hold_base", {"weight": 0})):
        value = tree.get(key)
        if value is None or (neutral and off.items() <= value.items()):
            tree.pop(key, None)
    return tree
