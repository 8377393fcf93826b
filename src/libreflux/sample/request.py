"""What a call of the pipeline asks for, as one checked value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.solve import Step
from libreflux.model.text import TextConditioning
from libreflux.sample.checks import arguments_of, check_values
from libreflux.sample.guidance import BatchCfg
from libreflux.sample.noise import Generators
from libreflux.sample.step_end import StepEndCallback, check_tensors

Prompts = str | Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawRequest:
    """The arguments of `LibreFluxPipeline.__call__`, by their names there. None is the model's own value.

    Raises:
        RecipeError: a value out of range.
    """

    prompt: Prompts | None = None
    negative_prompt: Prompts | None = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    generator: Generators = None
    seeds: int | Sequence[int] | None = None
    num_images_per_prompt: int = 1
    no_cfg_until: int = 0
    embedded_guidance: float | None = None
    prompt_conditioning: TextConditioning | None = None
    negative_conditioning: TextConditioning | None = None
    callback_on_step: Callable[[Step], None] | None = None
    output_type: str = "pil"
    prompt_2: Prompts | None = None
    negative_prompt_2: Prompts | None = None
    sigmas: Sequence[float] | None = None
    latents: Tensor | None = None
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_rescale: float = 0.0
    batch_cfg: BatchCfg = "auto"
    max_sequence_length: int | None = None
    tile: bool | None = None
    callback_on_step_end: StepEndCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    return_dict: bool = True

    def __post_init__(self) -> None:
        check_values(arguments_of(self))
        check_tensors(self.callback_on_step_end_tensor_inputs, "callback_on_step_end_tensor_inputs")

    @property
    def positive(self) -> Texts:
        """What the pictures shall show."""
        return Texts("prompt", self.prompt, self.prompt_2, self.prompt_conditioning, self.max_sequence_length)

    @property
    def negative(self) -> Texts:
        """What the pictures shall keep away from; the empty prompt if nothing was said."""
        prompt = "" if self.negative_prompt is None else self.negative_prompt
        second, ready = self.negative_prompt_2, self.negative_conditioning
        return Texts("negative_prompt", prompt, second, ready, self.max_sequence_length)


@dataclass(frozen=True, eq=False)
class Texts:
    """One side of a request: prompts to encode, or ready-made conditioning.

    Attributes:
        name: of the argument, for messages.
        prompts: CLIP's texts, and T5's.
        prompts_2: T5's, where they are others.
        ready: conditioning instead of texts.
        max_tokens: T5's limit; None is the model's own.

    Raises:
        RecipeError: neither texts nor conditioning, or both.
    """

    name: str
    prompts: Prompts | None
    prompts_2: Prompts | None
    ready: TextConditioning | None
    max_tokens: int | None

    def __post_init__(self) -> None:
        if self.ready is None:
            if self.prompts is None or (not isinstance(self.prompts, str) and not self.prompts):
                raise RecipeError(f"no {self.name}", hint=f"pass {self.name} or its conditioning")
            return
        if self.prompts or self.prompts_2:
            raise RecipeError(f"both {self.name} and its conditioning were given", hint="pass one of them")
        if self.max_tokens is not None:
            what = "has no effect on ready-made conditioning"
            raise RecipeError(what, where="max_sequence_length", hint="encode with it")
