"""The sections of a recipe: sources, sigmas, optimizer, samples, checkpoints. No torch here.

Every field's description is the one that the help, the documentation and the error lines reuse.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
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


def _known_home(value: str) -> str:
    if os.path.expanduser(value).startswith("~"):
        raise ValueError(f"{value!r} is the home of no user here; write ./~… for a folder of that name")
    return value


Whole = Annotated[int, BeforeValidator(_whole), Field(le=10**9)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_known_home)]
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

    path: Place = Field(description="folder of pictures with side-car .txt or metadata.jsonl captions")
    repeats: Whole = Field(default=1, ge=1, description="how often an epoch shows each picture")
    weight: Real = Field(
        default=1.0, gt=0, le=1000, description="factor on repeats; 0.5 shows each picture every second epoch"
    )
    loss_weight: Real = Field(default=1.0, gt=0, description="factor on the loss of these pictures")
    regularisation: bool = Field(
        default=False, description="keep what the base draws here: its own velocity is the target, not the pictures"
    )
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
        if weights is not None and (any(weight < 0 for weight in weights) or not 0 < sum(weights) < 1e9):
            raise ValueError("caption weights must be zero or more, one of them above zero, and below 1e9 in all")
        return value

    @model_validator(mode="after")
    def _captions_are_read(self) -> DataSource:
        idle = [key for key in ("captions", "prefix") if getattr(self, key)]
        if self.caption_dropout == 1 and idle:
            raise ValueError(f"caption_dropout 1 reads no caption, so {' and '.join(idle)} would do nothing; remove it")
        return self

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        from PIL import ImageColor

        try:
            known = all(0 <= part <= 255 for part in ImageColor.getrgb(value))
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"{value!r} is no colour; write a name such as white, or #rrggbb")
        return value


class SigmaSpec(Section):
    """The law of the training noise level sigma."""

    law: Literal["beta", "logit-normal", "uniform"] = Field(default="beta", description="beta, logit-normal or uniform")
    alpha: Real = Field(default=2.0, ge=0.1, le=100, description="first parameter of the Beta law")
    beta: Real = Field(default=2.0, ge=0.1, le=100, description="second parameter of the Beta law")
    mean: Real = Field(default=0.0, ge=-20, le=20, description="mean of logit(sigma) under the logit-normal law")
    std: Real = Field(default=1.0, ge=0.01, le=100, description="standard deviation of logit(sigma) under that law")
    shift: Real = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="s in sigma' = s sigma / (1 + (s - 1) sigma); 1: none, above 1: noisier",
    )
    uniform_floor: Real = Field(
        default=0.0, ge=0, lt=1, description="share of uniform mixed in, after the shift; all of it is law: uniform"
    )
    stratified: bool = Field(default=True, description="one draw per stratum over the whole batch, shuffled")

    @property
    def params(self) -> dict[str, float]:
        """The parameters that the law has."""
        return {name: getattr(self, name) for name in _LAW_PARAMS.get(self.law, ())}

    @model_validator(mode="after")
    def _no_idle_parameter(self) -> SigmaSpec:
        own = _LAW_PARAMS.get(self.law, ())
        for law, names in _LAW_PARAMS.items():
            for name in names:
                if name not in own and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to the {law} law and does nothing under {self.law}")
        if self.uniform_floor and self.law == "uniform" and self.shift == 1:
            raise ValueError("uniform_floor does nothing under the uniform law without a shift; remove it")
        return self


_LAW_PARAMS = {"beta": ("alpha", "beta"), "logit-normal": ("mean", "std")}


class OptimizerSpec(Section):
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw_bf16", "adamw_8bit"] = Field(
        default="adamw_bf16",
        description="adamw (fp32), adamw_bf16 (bf16 weights, stochastic rounding), adamw_8bit (CUDA, bitsandbytes)",
    )
    learning_rate: Real = Field(default=1e-4, gt=0, le=1000, description="peak learning rate")
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
    guidance: tuple[Annotated[Real, Field(ge=0)], ...] = Field(
        default=(3.0,),
        min_length=1,
        description="guidance scales to draw each prompt at; 1 with adapter.training_adapter or guided_target",
    )
    with_training_adapter: bool = Field(
        default=False, description="draw with adapter.training_adapter on, as a freed model; else as it will be used"
    )
    seed: Seed = Field(default=42, description="seed of the sample pictures")

    @model_validator(mode="after")
    def _something_to_draw(self) -> SampleSpec:
        off: dict[str, Any] = {name: {field.default} for name, field in type(self).model_fields.items()}
        off["every"].add(0)
        idle = [name for name, values in off.items() if getattr(self, name) not in values]
        if not self.prompts and idle:
            raise ValueError(f"{' and '.join(idle)} would do nothing without prompts; add prompts or remove it")
        return self


class HeldOutSpec(Section):
    """Pictures that are never trained on, and what is measured on them while training."""

    share: Real = Field(
        default=0.0, ge=0, lt=1, description="share of the pictures of data, chosen by their content; 0: none"
    )
    path: Place | None = Field(default=None, description="folder of other captioned pictures, instead of a share")
    every: Whole = Field(default=500, ge=0, description="steps between measurements, from step 0 on; 0: none")
    pictures: Whole = Field(default=64, ge=1, description="at most so many of them are measured")
    sigmas: tuple[Annotated[Real, Field(gt=0, lt=1)], ...] = Field(
        default=(0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="noise levels to measure at"
    )

    @property
    def chosen(self) -> bool:
        """Whether there are held-out pictures."""
        return self.share > 0 or self.path is not None

    def due(self, step: int, steps: int) -> bool:
        """Whether they are measured after `step` of `steps` steps."""
        return self.chosen and self.every > 0 and (step % self.every == 0 or step == steps)

    @model_validator(mode="before")
    @classmethod
    def _no_idle_key(cls, value: Any) -> Any:
        if isinstance(value, dict) and value and not {"share", "path"} & value.keys():
            raise ValueError("share or path must say which pictures are held out")
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> HeldOutSpec:
        if self.share > 0 and self.path is not None:
            raise ValueError("share and path each choose the pictures; keep one")
        if len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError("sigmas has the same value twice")
        return self


class SaveSpec(Section):
    """Checkpoints."""

    every: Whole = Field(default=500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep: Whole = Field(default=4, ge=1, description="how many of the newest stay")
    keep_every: Whole | None = Field(default=None, ge=1, description="steps whose multiples stay for good")
    averages_every: Whole | None = Field(
        default=None, ge=1, description="steps between averages kept for hindsight, 8 bytes a parameter; null: none"
    )

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> SaveSpec:
        if self.keep_every and self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} must be a multiple of every {self.every}: only those are saved"
            )
        return self
