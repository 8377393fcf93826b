"""The section of a recipe that says what is trained, and what is on the model beside it meanwhile. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from libreflux.errors import AdapterError
from libreflux.recipe.sections import Place, Real, SampleSpec, Section, Whole
from libreflux.values import adapter_argument


def _adapter(value: str) -> str:
    try:
        adapter_argument(value)
    except AdapterError as error:
        raise ValueError(f"{error.what}; {error.hint}") from None
    return value


class TargetSpec(Section):
    """Which layers an adapter factor applies to."""

    layers: str = Field(min_length=1, description="pattern of layer names, e.g. transformer_blocks.{0-7}.attn.**")
    factor: Whole | None = Field(
        default=None, ge=1, description="LoKr factor: larger is smaller and cheaper; default: 8"
    )


class AdapterSpec(Section):
    """What is trained on the frozen base; targets, preset, lycoris_config or init_from chooses its layers."""

    kind: Literal["lokr", "lora"] = Field(default="lokr", description="lokr or lora")
    init: Literal["perturbed", "ones", "kaiming"] | None = Field(
        default=None, description="start: perturbed (a LoKr's default), ones or kaiming (a LoRA's only one)"
    )
    scale: Real = Field(default=1e-3, gt=0, description="norm of a perturbed start relative to the base weight's")
    init_from: Place | None = Field(
        default=None, description="adapter file to start from, with its layers and their sizes"
    )
    rank: Whole | None = Field(default=None, ge=1, le=4096, description="rank of a LoRA; default: 16")
    alpha: Real | None = Field(default=None, gt=0, description="a LoRA is scaled by alpha / rank; default: the rank")
    targets: tuple[TargetSpec, ...] | None = Field(
        default=None, min_length=1, description="ordered patterns, the first match wins; default: every linear layer"
    )
    preset: Literal["libreflux-600m", "libreflux-3.2b"] | None = Field(
        default=None, description="libreflux-600m or libreflux-3.2b: LoKr of that many parameters on FLUX.1"
    )
    lycoris_config: Place | None = Field(default=None, description="lycoris_config.json, read by LyCORIS' own rules")
    role: Literal["ordinary", "training_adapter"] = Field(
        default="ordinary",
        description="training_adapter: made to be on a distilled model while another adapter is trained, never to draw",
    )
    training_adapter: Annotated[Place, AfterValidator(_adapter)] | None = Field(
        default=None,
        description="FILE or FILE:weight, such an adapter: on and frozen while this one is trained, no part of it",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """Spells out the defaults that depend on other keys, so that a resolved recipe shows them."""
        if not isinstance(value, dict):
            return value
        filled = dict(value)
        lora = filled.get("kind") == "lora"
        chosen = [key for key in _LAYERS_FROM if filled.get(key) is not None]
        if not chosen:
            filled["targets"], chosen = [{"layers": "**"}], ["targets"]
        if "init_from" not in chosen and filled.get("init") is None:
            filled["init"] = "kaiming" if lora else "perturbed"
        if lora and "targets" in chosen and filled.get("rank") is None:
            filled["rank"] = 16
        if not lora and isinstance(filled.get("targets"), list | tuple):
            filled["targets"] = [
                {**target, "factor": 8} if isinstance(target, dict) and target.get("factor") is None else target
                for target in filled["targets"]
            ]
        return filled

    @model_validator(mode="after")
    def _one_of_each(self) -> AdapterSpec:
        chosen = [key for key in _LAYERS_FROM if getattr(self, key) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each choose the layers; keep one")
        if self.init_from and self.init:
            raise ValueError("init_from is the start; remove init")
        if self.kind == "lora" and self.init not in (None, "kaiming"):
            raise ValueError(f"init {self.init} is for LoKr; a LoRA starts with kaiming")
        if self.kind == "lora" and (self.preset or any(target.factor for target in self.targets or ())):
            raise ValueError("factor and preset are for LoKr; a LoRA has a rank")
        if (self.rank or self.alpha) and (self.kind != "lora" or not self.targets):
            raise ValueError("rank and alpha belong to a LoRA with targets")
        if self.training_adapter and self.role != "ordinary":
            raise ValueError("role training_adapter makes one, and training_adapter uses one; remove one of them")
        if self.scale != 1e-3 and self.init != "perturbed":
            raise ValueError(f"scale belongs to the perturbed start and does nothing under {self.init or 'init_from'}")
        return self

    def decisive(self) -> dict[str, Any]:
        """What of it decides the trained numbers, as plain values; of a training adapter's file the contents do.

        Keys that are as in runs from before them are left out.
        """
        kept = self.model_dump(mode="json")
        if self.role == "ordinary":
            del kept["role"]
        del kept["training_adapter"]
        if self.training_adapter is not None:
            kept["training_adapter"] = f"at weight {adapter_argument(self.training_adapter)[1]:g}"
        return kept


_LAYERS_FROM = ("targets", "preset", "lycoris_config", "init_from")


def at_few_steps(tree: Any) -> Any:
    """A recipe's tree in which samples of what keeps few steps have guidance 1, if none is given.

    That is how a distilled model draws, without its training adapter, and one that was trained towards a guided target.
    It is spelled out here, so that a resolved recipe shows it.
    """
    if not isinstance(tree, dict):
        return tree
    adapter, guided, samples = tree.get("adapter"), tree.get("guided_target"), tree.get("samples")
    with_adapter = isinstance(adapter, dict) and adapter.get("training_adapter")
    with_target = isinstance(guided, dict) and guided.get("scale") != 1
    if not ((with_adapter or with_target) and isinstance(samples, dict)):
        return tree
    if not samples.get("prompts") or samples.get("with_training_adapter") or "guidance" in samples:
        return tree
    return {**tree, "samples": {**samples, "guidance": [1.0]}}


def refuse_idle(adapter: AdapterSpec, samples: SampleSpec) -> None:
    """Raises ValueError for samples with a training adapter that there is not."""
    if samples.with_training_adapter and adapter.training_adapter is None:
        raise ValueError("samples.with_training_adapter would do nothing without adapter.training_adapter; remove it")
