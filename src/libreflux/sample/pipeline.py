"""LibreFluxPipeline: true classifier-free guidance, text padded as its model was trained, noise by seed alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from libreflux.sample.encoding import encode_prompts, listed, matched
from libreflux.sample.finite import blamed
from libreflux.sample.guidance import BatchCfg, GuidedVelocity
from libreflux.sample.noise import Generators, start
from libreflux.sample.output import decoded, to_pil
from libreflux.sample.parts import FluxParts
from libreflux.sample.settings import NUMBERS, RESOLVED, check_values, resolve
from libreflux.sample.walk import TENSORS, Job, check_tensors, walk


@dataclass
class LibreFluxOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: PIL pictures, or one array: "np" [B, H, W, 3] or "pt" [B, 3, H, W] in [0, 1], "latent" [B, C, H/8, W/8].
        seeds: the seed of each picture; passed back in, it draws the picture again. Empty for given latents.
    """

    images: list[Image.Image] | np.ndarray | Tensor
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
                "this pipeline has no text encoders", mend="pass prompt_conditioning and negative_conditioning"
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
            guidance_scale: g >= 0. At 1 and below the conditional model, in a single pass. None is the model's own.
            guidance_start, guidance_stop: step i of N is guided where start <= i / N < stop; others cost one pass.
            no_cfg_until: the start as a count of steps.
            guidance_rescale: phi in [0, 1], see `flow.guidance.rescale`.
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
        job = self._prepare({name: value for name, value in locals().items() if name != "self"})
        x = job.x
        with self.progress_bar(total=len(job.sigmas) - 1) as progress:
            for step in walk(self, job):
                x = step.x
                if callback_on_step is not None:
                    callback_on_step(step)
                progress.update()
        with blamed(job.field):
            images = self._finish(latent_space.unpack(x, job.rows, job.columns), output_type, tile)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)  # type: ignore[return-value]  # as diffusers' pipelines do
        return LibreFluxOutput(images=images, seeds=job.seeds)

    @torch.no_grad()
    def steps(self, *args: Any, **options: Any) -> Iterator[tuple[Step, list[Image.Image]]]:
        """Draw as a call with these arguments does, step by step.

        Yields:
            Each `flow.solve.Step`, and the pictures that it points to, x0 = x - sigma v: the last are the call's own.

        Raises:
            RecipeError, ModelError: as a call; or an argument that only a call has a use for.
        """
        bound = inspect.signature(type(self).__call__).bind(self, *args, **options)
        for name in ("callback_on_step", "output_type", "return_dict"):
            if name in bound.arguments:
                raise RecipeError("has no effect on steps()", where=name, mend="leave it out")
        bound.apply_defaults()
        given = bound.arguments
        job = self._prepare(given)
        try:
            for step in walk(self, job):
                x0 = x0_from_velocity(step.x, step.velocity, step.sigma_next)
                latents = latent_space.unpack(x0, job.rows, job.columns)
                with blamed(job.field):
                    pixels = decoded(self.vae, latents, given["tile"])
                yield step, to_pil(pixels)
        finally:
            self.maybe_free_model_hooks()

    def _prepare(self, given: Mapping[str, Any]) -> Job:
        sizes = {name: self.default_size if given[name] is None else given[name] for name in ("height", "width")}
        check_values({**{name: given[name] for name in NUMBERS}, **sizes})
        tensors = given["callback_on_step_end_tensor_inputs"]
        check_tensors(tensors, "callback_on_step_end_tensor_inputs")
        rows, columns = (sizes[name] // latent_space.stride(self.vae) for name in ("height", "width"))
        settings = resolve(self.facts, rows * columns // 4, **{name: given[name] for name in RESOLVED})

        repeats, negative = given["num_images_per_prompt"], None
        positive = self._conditioning(given, "")
        if settings.guided:
            negative = matched(self._conditioning(given, "negative_"), len(positive)).repeat(repeats)
        positive = positive.repeat(repeats)
        x, seeds = start(
            given["latents"], given["seeds"], given["generator"], count=len(positive),
            channels=int(self.vae.config.latent_channels), rows=rows, columns=columns,
        )  # fmt: skip
        device = self._execution_device
        field = GuidedVelocity(
            self.transformer, positive.to(device), negative and negative.to(device),
            latent_space.image_ids(rows, columns, device=device), scale=settings.scale, guided=settings.guided,
            phi=given["guidance_rescale"], batch_cfg=given["batch_cfg"], embedded_guidance=settings.embedded,
        )  # fmt: skip
        return Job(field, x.to(device), settings.sigmas, rows, columns, seeds, given["callback_on_step_end"], tensors)

    def _conditioning(self, given: Mapping[str, Any], side: str) -> TextConditioning:
        """Of the prompts (side "") or the negative prompts ("negative_"): ready-made, or encoded."""
        what, ready = f"{side}prompt", given[f"{side or 'prompt_'}conditioning"]
        prompts, second, limit = given[what], given[f"{what}_2"], given["max_sequence_length"]
        if side and prompts is None:
            prompts = ""
        if ready is not None:
            if prompts or second:
                raise RecipeError(f"both {what} and its conditioning were given", mend="pass one of them")
            if limit is not None:
                raise RecipeError(
                    "has no effect on ready-made conditioning", where="max_sequence_length", mend="encode with it"
                )
            return ready  # type: ignore[no-any-return]
        if prompts is None or not listed(prompts):
            raise RecipeError(f"no {what}", mend=f"pass {what} or its conditioning")
        return self.encode_prompt(prompts, second, limit)

    def _finish(self, latents: Tensor, output_type: str, tile: bool | None) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return latents
        pixels = decoded(self.vae, latents, tile)
        if output_type == "np":
            return pixels.permute(0, 2, 3, 1).cpu().numpy()
        return pixels if output_type == "pt" else to_pil(pixels)
