"""LibreFluxPipeline: true classifier-free guidance, text padded as its model was trained, noise by seed alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from libreflux.errors import ModelError, RecipeError
from libreflux.flow.path import x0_from_velocity
from libreflux.flow.solve import Step
from libreflux.model import latents as latent_space
from libreflux.model.text import TextConditioning, TextEncoders
from libreflux.sample.checks import check_values
from libreflux.sample.denoise import denoise
from libreflux.sample.draw_settings import DrawSettings, resolve
from libreflux.sample.encoding import encode_prompts, listed, matched
from libreflux.sample.finite import blamed, check_latents
from libreflux.sample.first_steps import FirstSteps, handed_over
from libreflux.sample.guidance import BatchCfg, GuidedVelocity
from libreflux.sample.noise import Generators, start
from libreflux.sample.output import decoded, to_pil
from libreflux.sample.parts import FluxParts
from libreflux.sample.request import DrawRequest
from libreflux.sample.rules import GuidanceRule, Nag
from libreflux.sample.step_end import TENSORS, on_step_end

P = ParamSpec("P")
Result = TypeVar("Result")


def _taking(
    other: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, P], Result]]:
    """Gives a method that passes its arguments on the signature of the one that they are for."""

    def signed(method: Callable[..., Result]) -> Callable[Concatenate[Any, P], Result]:
        result = inspect.signature(method).return_annotation
        method.__signature__ = inspect.signature(other).replace(return_annotation=result)  # type: ignore[attr-defined]
        return method

    return signed


@dataclass
class LibreFluxOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: PIL pictures, or one array: "np" [B, H, W, 3] or "pt" [B, 3, H, W] in [0, 1], "latent" [B, C, H/8, W/8].
        seeds: the seed of each picture; passed back in, it draws the picture again. Empty for given latents.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    seeds: list[int]


@dataclass
class Drawing:
    """Pictures that are ready to be drawn.

    Attributes:
        settings: how.
        guided: the velocity, with the encoded prompts.
        noise: where to start, packed [B, N, 4C].
        rows, columns: of the latents.
        seeds: of the pictures; empty where the caller gave the noise.
    """

    settings: DrawSettings
    guided: GuidedVelocity
    noise: Tensor
    rows: int
    columns: int
    seeds: list[int]


class LibreFluxPipeline(FluxParts):
    """Text to image with a model of the FLUX family; see `__call__`.

    The transformer may be one in training: nothing is moved, switched or hooked by sampling with it.

    What diffusers' FluxPipeline (0.42) has is here by its name and meaning, but for what is meant to differ:

    - `guidance_scale` is true classifier-free guidance, there `true_cfg_scale`; a guidance-distilled model's own is
      `embedded_guidance`. Guidance needs no negative prompt: "" or None is the unconditional model.
    - `negative_prompt` is the second argument and `prompt_2` has no place: pass all but the prompts by name.
    - steps, guidance, tokens, shift and text padding that are not given are the model's own, from `facts`.
    - `prompt_conditioning` and `negative_conditioning` are what `prompt_embeds`, `pooled_prompt_embeds` and their
      negatives are there, ragged, so that the two sides, and prompts, may differ in length.
    - a generator gives seeds, and noise is the seed's: pictures are others than there, and the same in any batch.
    - `output_type="latent"` is [B, C, H/8, W/8], not packed. Sizes that are no multiple of 16 are refused, not rounded.
    - no `joint_attention_kwargs` and no image prompts (`ip_adapter_image` and its kin): nothing here would read them.

    Args:
        transformer, vae, scheduler: diffusers' classes. The scheduler is carried for other pipelines; this one follows
            `facts.shift`.
        tokenizer, text_encoder: CLIP's; all four text parts may be None when conditioning is always passed ready-made.
        tokenizer_2, text_encoder_2: T5's.
        facts: the model's facts, which may be set later too; None are those that the transformer came with, see
            `facts.facts_of`.
        image_encoder, feature_extractor: FluxPipeline's parts for image prompts: None, so that its components fit.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = list(TENSORS)
    _interrupt = False

    def encode_prompt(
        self,
        prompts: str | Sequence[str],
        prompts_2: str | Sequence[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> TextConditioning:
        """Prompts to conditioning, under the model's own text padding; warns of what an encoder does not see.

        Args:
            prompts, prompts_2, max_sequence_length: one or P texts and their limit, see `encoding.encode_prompts`.

        Raises:
            ModelError: the pipeline has no text encoders.
            RecipeError: see `encoding.encode_prompts`.
        """
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise ModelError(
                "this pipeline has no text encoders", hint="pass prompt_conditioning and negative_conditioning"
            )
        encoders = TextEncoders(self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)
        second = None if prompts_2 is None else listed(prompts_2)
        return encode_prompts(encoders, self.facts, listed(prompts), second, max_sequence_length)

    @property
    def interrupt(self) -> bool:
        """Set to True, from a callback or another thread, it ends the call after its step; each call clears it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        no_cfg_until: int = 0,
        embedded_guidance: float | None = None,
        prompt_conditioning: TextConditioning | None = None,
        negative_conditioning: TextConditioning | None = None,
        callback_on_step: Callable[[Step], None] | None = None,
        output_type: str = "pil",
        *,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        sigmas: Sequence[float] | None = None,
        latents: Tensor | None = None,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_rule: GuidanceRule = GuidanceRule(),
        nag: Nag = Nag(),
        first_steps: FirstSteps | None = None,
        batch_cfg: BatchCfg = "auto",
        max_sequence_length: int | None = None,
        tile: bool | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> LibreFluxOutput:
        """Draw pictures: v = v_u + g (v_c - v_u) along an Euler ladder from sigma 1 to 0.

        Args:
            prompt: one or P texts; or pass `prompt_conditioning`.
            negative_prompt: one text for all or P texts; "" or None is the unconditional model. Read only when guided.
            prompt_2, negative_prompt_2: other texts for T5, as in diffusers; CLIP reads `prompt`.
            height, width: pixels, multiples of 16; None is the size the VAE was made for.
            num_inference_steps: transformer steps; None is the model's own.
            sigmas: an own ladder, falling in (0, 1], without the last 0; the model's shift applies, as in diffusers.
            guidance_scale: g >= 0; 0 and 1 are none: the conditional model, in a single pass. None is the model's own.
            guidance_start, guidance_stop: step i of N is guided where start <= i / N < stop; others cost one pass.
            no_cfg_until: the start as a count of steps.
            guidance_rescale: phi in [0, 1], see `flow.guidance.rescale`.
            guidance_rule: what guided steps make of the two velocities: CFG, APG or CFG-Zero*.
            nag: guidance within attention, from the negative prompt; needs no `guidance_scale`.
            first_steps: another model that draws the first steps of the ladder, with its own guidance; None is none.
            batch_cfg: how the two passes run, see `GuidedVelocity`; equal up to rounding.
            embedded_guidance: for a guidance-distilled model (FLUX.1-dev) only; None is the model's own.
            num_images_per_prompt: pictures per prompt, in a row.
            generator: a source of seeds, or one per picture, when `seeds` is None. With neither, drawn afresh.
            seeds: one per picture, or a first one to count up from. A picture depends on its seed, not on its batch.
            latents: noise to start from instead, packed [B, N, 4C] as in diffusers or [B, C, H/8, W/8].
            prompt_conditioning, negative_conditioning: ready-made instead of the prompts; one negative may serve all.
            max_sequence_length: T5's limit, see `encode_prompt`.
            tile: decode in tiles that overlap, in less memory and with nearly the same pixels; None: above 1536 pixels.
            callback_on_step: called with each `flow.solve.Step`; its x is packed.
            callback_on_step_end: called as (pipe, step, timestep = 1000 sigma, tensors); what it returns replaces.
            callback_on_step_end_tensor_inputs: of "latents" (packed), "prompt_conditioning", "negative_conditioning".
            output_type: "pil", "np" [B, H, W, 3], "pt" [B, 3, H, W], both in [0, 1], or "latent" [B, C, H/8, W/8].
            return_dict: False returns the tuple (images,).

        Raises:
            RecipeError: a value out of range.
            ModelError: an embedded guidance for a model without, conditioning that cannot be made.
            NotFiniteError: latents or pixels overflow, or are NaN.
        """
        request = DrawRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            seeds=seeds,
            num_images_per_prompt=num_images_per_prompt,
            no_cfg_until=no_cfg_until,
            embedded_guidance=embedded_guidance,
            prompt_conditioning=prompt_conditioning,
            negative_conditioning=negative_conditioning,
            callback_on_step=callback_on_step,
            output_type=output_type,
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
            sigmas=sigmas,
            latents=latents,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            guidance_rescale=guidance_rescale,
            guidance_rule=guidance_rule,
            nag=nag,
            first_steps=first_steps,
            batch_cfg=batch_cfg,
            max_sequence_length=max_sequence_length,
            tile=tile,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            return_dict=return_dict,
        )
        output = self._draw(request)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images,)  # type: ignore[return-value]  # as diffusers' pipelines do

    def _draw(self, request: DrawRequest) -> LibreFluxOutput:
        drawing = self._prepare(request)
        x = drawing.noise
        with self.progress_bar(total=drawing.settings.steps) as progress:
            for step in self._denoise(drawing, request):
                x = step.x
                if request.callback_on_step is not None:
                    request.callback_on_step(step)
                progress.update()
        with blamed(drawing.guided):
            latents = latent_space.unpack(x, drawing.rows, drawing.columns)
            images = self._output(latents, request.output_type, request.tile)
        return LibreFluxOutput(images=images, seeds=drawing.seeds)

    @_taking(__call__)
    @torch.no_grad()
    def steps(self, *args: Any, **options: Any) -> Iterator[tuple[Step, list[Image.Image]]]:
        """Draw as a call with these arguments does, step by step.

        Yields:
            Each `flow.solve.Step`, and the pictures that it points to, x0 = x - sigma v: the last are the call's own.

        Raises:
            RecipeError, ModelError: as a call; or an argument that only a call has a use for.
        """
        bound = inspect.signature(type(self).__call__).bind(self, *args, **options).arguments
        for name in ("callback_on_step", "output_type", "return_dict"):
            if name in bound:
                raise RecipeError("has no effect on steps()", where=name, hint="leave it out")
        del bound["self"]
        request = DrawRequest(**bound)
        drawing = self._prepare(request)
        try:
            for step in self._denoise(drawing, request):
                x0 = x0_from_velocity(step.x, step.velocity, step.sigma_next)
                latents = latent_space.unpack(x0, drawing.rows, drawing.columns)
                with blamed(drawing.guided):
                    pixels = decoded(self.vae, latents, request.tile)
                yield step, to_pil(pixels)
        finally:
            self.maybe_free_model_hooks()

    def _prepare(self, request: DrawRequest) -> Drawing:
        height, width = (self.default_size if side is None else side for side in (request.height, request.width))
        check_values({"height": height, "width": width})
        rows, columns = (side // latent_space.stride(self.vae) for side in (height, width))
        settings = resolve(self.facts, rows * columns // 4, request)
        limit, positive, negative = request.max_sequence_length, request.prompt_conditioning, None
        if positive is None:
            positive = self.encode_prompt(request.prompts, request.prompt_2, limit)
        if settings.guided_steps or request.nag.nag:
            negatives, ready = request.negative_prompts, request.negative_conditioning
            if ready is None:
                ready = self.encode_prompt(negatives, request.negative_prompt_2, limit)
            negative = matched(ready, len(positive))
            negative = negative.repeat(request.num_images_per_prompt).to(self._execution_device)
        positive = positive.repeat(request.num_images_per_prompt).to(self._execution_device)
        shape = (len(positive), int(self.vae.config.latent_channels), rows, columns)
        noise, seeds = start(request.latents, request.seeds, request.generator, shape)
        guided = GuidedVelocity(
            transformer=self.transformer,
            positive=positive,
            negative=negative,
            image_ids=latent_space.image_ids(rows, columns, device=self._execution_device),
            scale=settings.scale,
            guided_steps=settings.guided_steps,
            rescale=request.guidance_rescale,
            rule=settings.rule,
            nag=request.nag,
            batch_cfg=request.batch_cfg,
            embedded_guidance=settings.embedded,
        )
        return Drawing(settings, guided, noise.to(self._execution_device), rows, columns, seeds)

    def _denoise(self, drawing: Drawing, request: DrawRequest) -> Iterator[Step]:
        """The steps; the last one is where the sigmas end, or where the pipeline was interrupted."""
        self.interrupt = False
        callback, names = request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
        replaced = on_step_end(self, drawing.guided, callback, names)
        guided, sigmas = drawing.guided, drawing.settings.sigmas
        check = functools.partial(check_latents, guided=guided)
        follow = handed_over(request.first_steps, guided, request.num_images_per_prompt)
        for step in denoise(follow, drawing.noise, sigmas, on_step_end=replaced, check=check):
            yield step
            if self.interrupt:
                return

    def _output(self, latents: Tensor, output_type: str, tile: bool | None) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return latents
        pixels = decoded(self.vae, latents, tile)
        if output_type == "np":
            return pixels.permute(0, 2, 3, 1).cpu().numpy()
        return pixels if output_type == "pt" else to_pil(pixels)
