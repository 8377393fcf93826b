"""What a call of the pipeline asks for, as one checked value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from libreflux.errors import RecipeError
from libreflux.flow.solve import Step
from libreflux.model.text import TextConditioning
from libreflux.sample.checks import arguments_of, check_values
from libreflux.sample.encoding import listed
from libreflux.sample.first_steps import FirstSteps
from libreflux.sample.guidance import BatchCfg
from libreflux.sample.noise import Generators
from libreflux.sample.rules import GuidanceRule, Nag
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
    guidance_rule: GuidanceRule = field(default_factory=GuidanceRule)
    nag: Nag = field(default_factory=Nag)
    first_steps: FirstSteps | None = None
    batch_cfg: BatchCfg = "auto"
    max_sequence_length: int | None = None
    tile: bool | None = None
    callback_on_step_end: StepEndCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    return_dict: bool = True

    def __post_init__(self) -> None:
        check_values(arguments_of(self))
        check_tensors(self.callback_on_step_end_tensor_inputs, "callback_on_step_end_tensor_inputs")
        if self.prompt_conditioning is None and not self.prompts:
            raise RecipeError("no prompt", hint="pass prompt or its conditioning")
        if self.prompt_conditioning is not None:
            self._refuse_text("prompt", self.prompt, self.prompt_2)

    @property
    def prompts(self) -> list[str]:
        """What the pictures shall show; none where the conditioning is given."""
        return [] if self.prompt is None else listed(self.prompt)

    @property
    def negative_prompts(self) -> list[str]:
        """What the pictures shall keep away from: the empty prompt if nothing was said; read only where it is guided.

        Raises:
            RecipeError: no text, or text beside its conditioning.
        """
        if self.negative_conditioning is not None:
            self._refuse_text("negative_prompt", self.negative_prompt, self.negative_prompt_2)
        given = [""] if self.negative_prompt is None else listed(self.negative_prompt)
        if not given:
            raise RecipeError("no negative_prompt", hint="pass negative_prompt or its conditioning")
        return given

    def _refuse_text(self, name: str, prompts: Prompts | None, prompts_2: Prompts | None) -> None:
        """Raises RecipeError for text, or a limit of text, beside ready-made conditioning."""
        if prompts or prompts_2:
            raise RecipeError(f"both {name} and its conditioning were given", hint="pass one of them")
        if self.max_sequence_length is not None:
            what = "has no effect on ready-made conditioning"
            raise RecipeError(what, where="max_sequence_length", hint="encode with it")
