"""A run's recipe: one pydantic tree, read from YAML and dotted overrides; what nobody knows is refused. No torch here.

Paths in a recipe are relative to the folder that the command runs in. Every field's description is the one that the
help, the documentation and the error lines reuse.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from libreflux.errors import RecipeError
from libreflux.places import did_you_mean
from libreflux.recipe import faults, flow_keys, yaml_text
from libreflux.recipe.adapter_section import AdapterSpec, TargetSpec, at_few_steps, refuse_idle
from libreflux.recipe.auto import CountOrAuto, FlagOrAuto, OnOffOrAuto
from libreflux.recipe.differences import INDECISIVE, differences
from libreflux.recipe.distil import AdversarialSpec, DistilSpec, refuse_faults
from libreflux.recipe.flow_keys import GuidedTarget, GuidedTargetSpec, HoldBase, HoldBaseSpec
from libreflux.recipe.sections import (
    DataSource,
    HeldOutSpec,
    OptimizerSpec,
    Place,
    Real,
    SampleSpec,
    SaveSpec,
    Section,
    Seed,
    SigmaSpec,
    Whole,
    later,
)
from libreflux.values import is_side

__all__ = [
    "AdapterSpec",
    "AdversarialSpec",
    "DataSource",
    "DistilSpec",
    "GuidedTargetSpec",
    "HeldOutSpec",
    "HoldBaseSpec",
    "OptimizerSpec",
    "Recipe",
    "SampleSpec",
    "SaveSpec",
    "SigmaSpec",
    "TargetSpec",
    "differences",
    "load_recipe",
    "read_recipe",
    "recipe_of",
]


class Recipe(Section):
    """Everything a training run is a function of."""

    schema_version: Literal[1] = Field(default=1, alias="schema", description="version of this format")
    model: Place = Field(default="emoji-base", description="model that is adapted: a name, a folder, a hub id")
    base: Literal["fp32", "bf16", "int8", "w8a8"] = Field(
        default="bf16",
        description="the frozen base's weights: bf16, fp32, or int8 (half the memory of bf16); "
        "w8a8: int8, multiplied by activations of 8 bits too (faster on a CPU, on a card with compile; less exact)",
    )
    objective: Literal["flow", "distil"] = Field(
        default="flow", description="flow: plain flow matching; distil: the base's guided steps in fewer and plain ones"
    )
    distil: DistilSpec | None = Field(default=None, description="for objective distil: its guidance and steps")
    guided_target: GuidedTarget = Field(
        default=None, description="for objective flow: train towards more than the picture, to keep few steps drawing"
    )
    hold_base: HoldBase = Field(
        default=None, description="for objective flow: a penalty for leaving what the base says of the same pictures"
    )
    text_padding: Literal["drop", "trim"] = Field(
        default="drop", description="drop: no padding anywhere; trim: T5 sees it"
    )
    data: tuple[DataSource, ...] = Field(min_length=1, description="folders of captioned pictures")
    resolution: tuple[Annotated[Whole, Field(ge=16, le=8192)], ...] = Field(
        min_length=1, description="side of the training crops in pixels; of several, every picture is shown at each"
    )
    crop: tuple[Literal["square", "aspect", "centre"], ...] = Field(
        default=("square",),
        min_length=1,
        description="square, centre (never off-centre) or aspect (about the picture's own shape); of several, each",
    )
    max_quarantined: Real = Field(
        default=0.02, ge=0, le=1, description="share of pictures that may be unusable before the run stops"
    )
    text_cache: Literal["bf16", "int8", "none"] = Field(
        default="bf16",
        description="captions are encoded once and stored in bf16, or in int8 (half the disk); none: in every step",
    )
    text_precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="what the text encoders compute in; auto: as an existing cache, else fp32 on a CPU, bf16 on a card",
    )
    latents: Literal["mean", "sample"] = Field(
        default="mean",
        description="mean of the VAE's posterior, or at each visit another sample of it (twice the disk)",
    )
    adapter: AdapterSpec = Field(default_factory=lambda: AdapterSpec.model_validate({}), description="what is trained")
    sigmas: SigmaSpec = Field(default_factory=SigmaSpec, description="law of the noise level")
    batch: Whole = Field(default=1, ge=1, description="pictures per forward pass on each device")
    accumulate: Whole = Field(default=1, ge=1, description="forward passes per step")
    gradient_checkpointing: FlagOrAuto = Field(
        default=False,
        description="true: keep each block's input alone and compute it again in backward, in less memory, slower; "
        "auto: for as many blocks as memory demands",
    )
    offload_blocks: CountOrAuto = Field(
        default=0,
        description="blocks of the base that wait in RAM and come to a small card in turn; auto: as few as have to",
    )
    steps: Whole = Field(ge=1, description="optimizer steps of the whole run")
    max_skipped: Whole = Field(
        default=5,
        ge=1,
        description="steps without a finite loss and gradient are skipped; so many in a row end the run",
    )
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, description="AdamW and its learning rate")
    ema: tuple[Real, ...] = Field(
        default=(0.05, 0.1), description="relative widths (sigma_rel) of the averages that are tracked; []: none"
    )
    ema_every: Whole = Field(
        default=1, ge=1, description="steps between two updates of the averages, which cost a copy of the adapter each"
    )
    samples: SampleSpec = Field(default_factory=SampleSpec, description="pictures drawn while training")
    held_out: HeldOutSpec = Field(
        default_factory=HeldOutSpec, description="pictures that are never trained on, measured while training"
    )
    gradient_norms: bool = Field(
        default=False, description="also write the gradient norm of each group of layers to metrics.jsonl"
    )
    tensorboard: bool = Field(
        default=False,
        description="also write curves and sample sheets to out/tensorboard; needs libreflux[tensorboard]",
    )
    save: SaveSpec = Field(default_factory=SaveSpec, description="checkpoints")
    guidance: Real | None = Field(
        default=None, ge=0, description="embedded guidance to train at, for a model that has one (FLUX.1-dev)"
    )
    seed: Seed = Field(default=0, description="seed of everything random")
    device: str = Field(default="auto", min_length=1, description="auto, cpu, cuda, cuda:N or mps")
    deterministic: bool = Field(
        default=False,
        description="on CUDA the same bits again, by slower kernels; else sums inside kernels have no fixed order",
    )
    threads: Whole | None = Field(default=None, ge=1, description="CPU threads; default: as many as torch chooses")
    compile: OnOffOrAuto = Field(
        default="auto",
        description="compile the blocks by kind, which changes last bits; auto: on a card, where it saves time",
    )
    out: Place = Field(description="run folder")
    cache: Place | None = Field(default=None, description="folder of the prepared data; default: out/cache")

    @field_validator("out", "cache")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(value)

    @field_validator("text_padding", mode="before")
    @classmethod
    def _not_yet(cls, value: Any) -> Any:
        return later(value, "keep", "bias")

    @field_validator("resolution", "crop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        values = list(value) if isinstance(value, list | tuple) else [value]
        return [later(one, "closest", "preserve", "random") for one in values]

    @field_validator("resolution")
    @classmethod
    def _packable(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        for value in values:
            if not is_side(value):
                raise ValueError(f"{value} is not a multiple of 16 (8 of the VAE, 2 of the packing)")
        return values

    @field_validator("resolution", "crop")
    @classmethod
    def _no_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("the same value is given twice")
        return values

    @field_validator("ema")
    @classmethod
    def _widths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.01 <= width <= 0.28 for width in value) or len(set(value)) < len(value):
            raise ValueError("wanted different widths from 0.01 to 0.28, such as [0.05, 0.1]")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return at_few_steps(value)

    @model_validator(mode="after")
    def _objective(self) -> Recipe:
        refuse_faults(self.objective, self.distil, self.data, self.steps, self.sigmas)
        flow_keys.refuse_idle(self.guided_target, self.hold_base, self.objective, self.data)
        return self

    @model_validator(mode="after")
    def _no_idle_key(self) -> Recipe:
        """Every cadence may exceed `steps`, since a run can be prolonged; a warm-up may not, as it hides the rate."""
        refuse_idle(self.adapter, self.samples)
        if self.optimizer.warmup >= self.steps:
            told = f"optimizer.warmup {self.optimizer.warmup} would fill all of steps {self.steps}"
            raise ValueError(f"{told}, and optimizer.learning_rate never be trained at; shorten it")
        if self.save.averages_every and not self.ema:
            raise ValueError("save.averages_every would keep nothing while ema is []; remove one of the two")
        if self.ema_every > 1 and not self.ema:
            raise ValueError("ema_every would do nothing while ema is []; remove one of the two")
        if self.save.averages_every and self.save.averages_every % self.ema_every:
            told = f"save.averages_every {self.save.averages_every} must be a multiple of ema_every {self.ema_every}"
            raise ValueError(f"{told}: the averages stand still between")
        if set(self.crop) == {"centre"} and any(source.crops_per_picture > 1 for source in self.data):
            raise ValueError("data.crops_per_picture would do nothing under crop: centre; remove it or use square")
        return self

    @model_validator(mode="after")
    def _offloading(self) -> Recipe:
        if self.offload_blocks and self.gradient_checkpointing is False:
            told = "offload_blocks needs gradient_checkpointing: true or auto"
            raise ValueError(f"{told}: without it, every block that waits would stay on the card until backward")
        return self

    @property
    def cache_dir(self) -> Path:
        """Folder of the prepared data."""
        return Path(self.cache) if self.cache else Path(self.out) / "cache"

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return flow_keys.as_ever(handler(self))

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that ``load_recipe`` reads back to an equal one."""
        return yaml_text.dump(self.resolved())

    def decisive(self, world: int = 1) -> dict[str, Any]:
        """The resolved keys that decide the trained numbers: what a resumed run may not change.

        Of ``accumulate`` and the number of processes, ``world``, it is the product.

        Where things are written, what is drawn or measured and how often is saved do not; nor does the number of steps
        when the learning rate does not depend on it. Of ``held_out`` the share alone does: it takes pictures away. Nor
        does where the data lies, whose contents have a hash of their own, or what changes last bits alone.
        """
        kept = {name: value for name, value in self.resolved().items() if name not in INDECISIVE}
        if self.optimizer.schedule == "constant":
            del kept["steps"]
        kept["accumulate"] *= world
        flow_keys.as_ever(kept, neutral=True)
        if self.latents == "mean":  # the only one that runs without this key had
            del kept["latents"]
        kept["adapter"] = self.adapter.decisive()
        kept["held_out"] = {"share": self.held_out.share}
        kept["data"] = [{name: value for name, value in source.items() if name != "path"} for source in kept["data"]]
        kept["text_cache"] = kept["text_cache"].replace("none", "bf16")  # what is encoded anew has the same values
        return kept

    def last_bits(self) -> dict[str, Any]:
        """Keys that change the last bits of a result at most; the number of threads, which is the machine's, apart."""
        return {name: getattr(self, name) for name in ("gradient_checkpointing", "text_cache")}

    def places(self) -> dict[str, str]:
        """Dotted keys of what training reads, with their paths; of each the contents count, wherever they lie."""
        return {"model": self.model, **{f"data.{number}.path": one.path for number, one in enumerate(self.data)}}

    def fingerprint(self, world: int = 1) -> str:
        """SHA-256 over :meth:`decisive`, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.decisive(world), sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from YAML and lays ``a.b=c`` overrides over it; values of overrides are YAML too.

    List items are named by their number (``data.0.path=photos``); one past the end appends.

    Raises:
        RecipeError: unreadable file or override, unknown key (with the nearest known one), or bad value.
    """
    if path is None:
        return read_recipe("", "recipe", overrides)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError("no such recipe", where=path, hint=did_you_mean(Path(path))) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read ({error})", where=path, hint="give a YAML file in UTF-8") from None
    return read_recipe(text, str(path), overrides)


def read_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of YAML in memory; ``where`` is what errors call it."""
    try:
        tree: Any = yaml_text.parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {yaml_text.said(error)}", where=where, hint="correct that line") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=where, hint="start lines with `key: value`")
    return recipe_of(tree, where, overrides)


def recipe_of(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` of keys and values, into which the overrides are written; ``where`` is what errors call it."""
    for override in overrides:
        yaml_text.override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise faults.explain(error, where, Recipe) from None
