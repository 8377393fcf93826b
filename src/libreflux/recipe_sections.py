"""The sections of a recipe: sources, adapter, sigmas, optimizer, samples, checkpoints. No torch here.

Every field's description is the one that the help, the documentation and the error lines reuse.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError


def _whole(value: Any) -> Any:
    """2e4 and 20_000.0 are whole numbers to a reader; true is none."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a whole number is wanted")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number is wanted")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]


def later(value: Any, *names: str) -> Any:
    """Refuses what the design names and this version does not do."""
    if value in names:
        raise ValueError(f"{value!r} is not supported yet")
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True, protected_namespaces=())


class DataSource(Section):
    """One folder of captioned pictures."""

    path: str = Field(description="folder of pictures with side-car .txt or metadata.jsonl captions")
    repeats: Whole = Field(default=1, ge=1, description="how often an epoch shows each picture")
    weight: Real = Field(
        default=1.0, gt=0, le=1000, description="factor on repeats; 0.5 shows each picture every second epoch"
    )
    loss_weight: Real = Field(default=1.0, gt=0, description="factor on the loss of these pictures")
    prefix: str = Field(default="", description="text put before each caption, not before a dropped one")
    folder_captions: bool = Field(
        default=False, description="10_name folders: the name is the caption of pictures that have none"
    )
    min_size: Whole = Field(default=0, ge=0, description="shorter side in pixels below which a picture is left out")
    captions: dict[str, Real] | list[Real] | None = Field(
        default=None,
        description="weights of the captions, by their name in metadata.jsonl or by line; default: all alike",
    )
    caption_dropout: Real = Field(default=0.1, ge=0, le=1, description="share of visits that see the empty prompt")
    crops_per_picture: Whole = Field(
        default=1, ge=1, le=64, description="cached crops of each picture; 1 is the centre"
    )
    background: str = Field(default="white", description="colour laid under transparent pictures")

    @field_validator("captions")
    @classmethod
    def _weights(cls, value: dict[str, float] | list[float] | None) -> dict[str, float] | list[float] | None:
        weights = list(value.values()) if isinstance(value, dict) else value
        if weights is not None and (any(weight < 0 for weight in weights) or not sum(weights) > 0):
            raise ValueError("caption weights must be zero or more, and one of them above zero")
        return value

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(value)
        except ValueError:
            raise ValueError(f"{value!r} is no colour; write a name such as white, or #rrggbb") from None
        return value


class TargetSpec(Section):
    """Which layers an adapter factor applies to."""

    layers: str = Field(min_length=1, description="pattern of layer names, e.g. transformer_blocks.{0-7}.attn.**")
    factor: Whole = Field(default=8, ge=1, description="LoKr factor: larger is smaller and cheaper")


class AdapterSpec(Section):
    """What is trained on top of the frozen base."""

    kind: Literal["lokr"] = Field(default="lokr", description="lokr")
    init: Literal["perturbed", "ones", "kaiming"] = Field(default="perturbed", description="start of the LoKr matrices")
    scale: Real = Field(default=1e-3, gt=0, description="norm of a perturbed start relative to the base weight's")
    targets: tuple[TargetSpec, ...] = Field(
        default=(TargetSpec(layers="**", factor=8),), min_length=1, description="ordered patterns, the first match wins"
    )

    @field_validator("kind", mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        return later(value, "lora")


class SigmaSpec(Section):
    """The law of the training noise level sigma."""

    law: Literal["beta", "uniform"] = Field(default="beta", description="beta or uniform")
    alpha: Real = Field(default=2.0, gt=0, description="first parameter of the Beta law")
    beta: Real = Field(default=2.0, gt=0, description="second parameter of the Beta law")
    stratified: bool = Field(default=True, description="one draw per stratum over the whole batch, shuffled")
    uniform_floor: Real = Field(default=0.0, ge=0, le=1, description="share of uniform mixed in; only 0 so far")

    @field_validator("law", mode="before")
    @classmethod
    def _law(cls, value: Any) -> Any:
        return later(value, "logit-normal", "logit_normal")

    @field_validator("uniform_floor")
    @classmethod
    def _floor(cls, value: float) -> float:
        if value:
            raise ValueError("a uniform floor above 0 is not supported yet")
        return value


class OptimizerSpec(Section):
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw_bf16"] = Field(
        default="adamw_bf16", description="adamw (fp32), or adamw_bf16 (bf16 weights, stochastic rounding)"
    )
    learning_rate: Real = Field(default=1e-4, gt=0, description="peak learning rate")
    weight_decay: Real = Field(default=0.01, ge=0, description="decoupled weight decay")
    betas: tuple[Real, Real] = Field(default=(0.9, 0.999), description="decay rates of the two moments")
    warmup: Whole = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="after the warm-up: constant, or falling to zero at the last step"
    )
    clip: Real | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null: no clipping")

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must be in [0, 1)")
        return value


class SampleSpec(Section):
    """Pictures drawn while training."""

    every: Whole = Field(default=500, ge=0, description="steps between sample pictures; 0: none")
    at_start: bool = Field(default=False, description="also before the first step")
    prompts: tuple[str, ...] = Field(default=(), description="what to draw")
    guidance: tuple[Real, ...] = Field(
        default=(3.0,), min_length=1, description="guidance scales to draw each prompt at"
    )
    seed: Whole = Field(default=42, ge=0, description="seed of the sample pictures")


class SaveSpec(Section):
    """Checkpoints."""

    every: Whole = Field(default=500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep: Whole = Field(default=4, ge=1, description="how many of the newest stay")
    keep_every: Whole | None = Field(default=None, ge=1, description="steps whose multiples stay for good")
