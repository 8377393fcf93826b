"""LibreFluxPipeline: true classifier-free guidance in one batch, unpadded text, noise by seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from libreflux import keyed
from libreflux.errors import ModelError, RecipeError
from libreflux.flow.guidance import cfg
from libreflux.flow.schedule import ladder, shift_for_tokens
from libreflux.flow.solve import Step, euler
from libreflux.model import latents as latent_space
from libreflux.model.facts import Facts, write_facts
from libreflux.model.family import Model, open_model
from libreflux.model.text import TextConditioning, TextEncoders
from libreflux.model.velocity import velocity

OUTPUT_TYPES = ("pil", "pt", "latent")


@dataclass
class LibreFluxOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: PIL pictures, or one tensor: "pt" [B, 3, H, W] in [0, 1], "latent" [B, C, H/8, W/8].
        seeds: the seed of each picture; passed back in, it draws the picture again.
    """

    images: list[Image.Image] | Tensor
    seeds: list[int]


class LibreFluxPipeline(DiffusionPipeline):
    """Text to image with a model of the FLUX family; see `__call__`.

    The transformer may be one in training: nothing is moved, switched or hooked by sampling with it.

    Args:
        transformer, vae, scheduler: diffusers' classes. The scheduler is carried for other pipelines; this one follows
            `facts.shift`.
        tokenizer, text_encoder: CLIP's; all four text parts may be None when conditioning is always passed ready-made.
        tokenizer_2, text_encoder_2: T5's.
        facts: the model's facts.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar[list[str]] = [
        "scheduler",
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
    ]

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: T5EncoderModel | None = None,
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
        )
        self.facts = facts if facts is not None else Facts(guidance_embeds=bool(transformer.config.guidance_embeds))

    @classmethod
    def from_model(cls, model: Model) -> LibreFluxPipeline:
        """A pipeline over an opened model; its text encoders may be absent, its transformer and VAE may not.

        The VAE becomes fp32: it is small beside the transformer, and bf16 would leave bands in flat colours.
        """
        if model.transformer is None or model.vae is None:
            raise ModelError(f"{model.name} was opened without transformer or vae", mend="open it with both parts")
        text = model.text
        return cls(
            transformer=model.transformer,
            vae=model.vae.float(),
            scheduler=model.scheduler,
            tokenizer=text and text.tokenizer,
            text_encoder=text and text.text_encoder,
            tokenizer_2=text and text.tokenizer_2,
            text_encoder_2=text and text.text_encoder_2,
            facts=model.facts,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> LibreFluxPipeline:
        """Open "emoji-base", a folder or a hub id; see `model.family.open_model`. `torch_dtype` is `dtype` too."""
        return cls.from_model(open_model(name, dtype=dtype or torch_dtype, device=device))

    @property
    def default_size(self) -> int:
        """Pixels per side that the VAE was made for, in multiples of 16."""
        return max(16, int(self.vae.config.sample_size) // 16 * 16)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """diffusers' own, and the facts beside it, so that `from_pretrained` draws alike."""
        super().save_pretrained(save_directory, **options)
        write_facts(Path(save_directory), self.facts)

    def encode_prompt(self, prompts: str | Sequence[str]) -> TextConditioning:
        """Prompts to conditioning, under the model's own text padding.

        Raises:
            ModelError: the pipeline has no text encoders.
        """
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise ModelError(
                "this pipeline has no text encoders", mend="pass prompt_conditioning and negative_conditioning"
            )
        encoders = TextEncoders(self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)
        return encoders.encode(_listed(prompts), padding=self.facts.text_padding, max_tokens=self.facts.max_tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        no_cfg_until: int = 0,
        embedded_guidance: float | None = None,
        prompt_conditioning: TextConditioning | None = None,
        negative_conditioning: TextConditioning | None = None,
        callback_on_step: Callable[[Step], None] | None = None,
        output_type: str = "pil",
    ) -> LibreFluxOutput:
        """Draw pictures: v = v_u + g (v_c - v_u) along an Euler ladder from sigma 1 to 0.

        Args:
            prompt: one or P texts; or pass `prompt_conditioning`.
            negative_prompt: one text for all or P texts; "" is the unconditional model. Read only when guided.
            height, width: pixels, multiples of 16; None is the size the VAE was made for.
            num_inference_steps: transformer steps; None is the model's own.
            guidance_scale: g >= 0. 1 is the conditional model, in a single pass per step; else both passes are one
                batch [negative, prompt]. None is the model's own.
            generator: a source of seeds, when `seeds` is None. With neither, seeds are drawn afresh.
            seeds: one per picture, or a first one to count up from. A picture depends on its seed, not on its batch.
            num_images_per_prompt: pictures per prompt, in a row.
            no_cfg_until: the first steps (a count) that go without guidance, in a single pass.
            embedded_guidance: for a guidance-distilled model (FLUX.1-dev) only; None is the model's own.
            prompt_conditioning, negative_conditioning: ready-made instead of the prompts; one negative may serve all.
            callback_on_step: called with each `flow.solve.Step`; its x is packed.
            output_type: "pil", "pt" or "latent".

        Raises:
            RecipeError: a value out of range.
            ModelError: an embedded guidance for a model without, conditioning that cannot be made.
        """
        facts = self.facts
        own_scale = 1.0 if facts.guidance_embeds else facts.guidance
        scale = own_scale if guidance_scale is None else float(guidance_scale)
        steps = facts.steps if num_inference_steps is None else num_inference_steps
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        _check_values(height, width, steps, scale, num_images_per_prompt, no_cfg_until, output_type)
        if facts.guidance_embeds and embedded_guidance is None:
            embedded_guidance = facts.guidance
        guided_from = steps if scale == 1.0 else no_cfg_until

        positive = self._conditioning("prompt", prompt, prompt_conditioning)
        negative = None
        if guided_from < steps:
            negative = self._conditioning("negative_prompt", negative_prompt, negative_conditioning)
            negative = _match(negative, len(positive)).repeat(num_images_per_prompt)
        positive = positive.repeat(num_images_per_prompt)
        chosen = choose_seeds(seeds, generator, len(positive))

        device = self._execution_device
        rows, columns = height // latent_space.stride(self.vae), width // latent_space.stride(self.vae)
        ids = latent_space.image_ids(rows, columns, device=device)
        field = guided_velocity(
            self.transformer, positive.to(device), negative and negative.to(device), ids, scale=scale,
            guided_from=guided_from, embedded_guidance=embedded_guidance,
        )  # fmt: skip
        shift = shift_for_tokens(ids.shape[0]) if facts.shift is None else facts.shift
        x = latent_space.pack(noise(chosen, int(self.vae.config.latent_channels), rows, columns)).to(device)
        with self.progress_bar(total=steps) as progress:
            for step in euler(field, x, ladder(steps, shift)):
                x = step.x
                if callback_on_step is not None:
                    callback_on_step(step)
                progress.update()
        images = self._finish(latent_space.unpack(x, rows, columns), output_type)
        self.maybe_free_model_hooks()
        return LibreFluxOutput(images=images, seeds=chosen)

    def _conditioning(
        self, what: str, prompts: str | Sequence[str] | None, ready: TextConditioning | None
    ) -> TextConditioning:
        if ready is not None:
            if prompts:
                raise RecipeError(f"both {what} and its conditioning were given", mend="pass one of them")
            return ready
        if prompts is None or not _listed(prompts):
            raise RecipeError(f"no {what}", mend=f"pass {what} or its conditioning")
        return self.encode_prompt(prompts)

    def _finish(self, latents: Tensor, output_type: str) -> list[Image.Image] | Tensor:
        if output_type == "latent":
            return latents
        # One by one: the VAE's activations are large, and batch mates stay without effect.
        pixels = torch.cat([latent_space.decode(self.vae, one[None]) for one in latents]).float()
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        return pixels if output_type == "pt" else to_pil(pixels)


def guided_velocity(
    transformer: FluxTransformer2DModel,
    positive: TextConditioning,
    negative: TextConditioning | None,
    image_ids: Tensor,
    *,
    scale: float,
    guided_from: int = 0,
    embedded_guidance: float | None = None,
) -> Callable[[Tensor, float], Tensor]:
    """A velocity callable for `flow.solve`: classifier-free guidance in one batch of 2B, from call `guided_from` on.

    Args:
        positive: B prompts.
        negative: B prompts; None when no call is guided.
        scale: the guidance scale; 1 makes every call a single pass.
        guided_from: calls before this one are single passes.
        embedded_guidance: see `model.velocity`.
    """
    both = None if negative is None else TextConditioning.cat([negative, positive])
    calls = 0

    def field(x: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        guided = both is not None and scale != 1.0 and calls >= guided_from
        calls += 1
        text = both if guided and both is not None else positive
        batch = torch.cat([x, x]) if guided else x
        sigmas = torch.full((batch.shape[0],), sigma, dtype=torch.float32, device=x.device)
        v = velocity(transformer, batch, sigmas, text, image_ids, guidance=embedded_guidance)
        if not guided:
            return v
        v_uncond, v_cond = v.chunk(2)
        return cfg(v_cond, v_uncond, scale)

    return field


def noise(seeds: Iterable[int], channels: int, rows: int, columns: int) -> Tensor:
    """[B, channels, rows, columns] fp32, drawn on the CPU: picture i is a function of seeds[i] and the size."""
    return torch.stack(
        [torch.randn(channels, rows, columns, generator=keyed.generator(seed, "noise")) for seed in seeds]
    )


def choose_seeds(
    seeds: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """`count` seeds: as given, counted up from one, drawn from a generator (or from one each), or drawn afresh."""
    if isinstance(seeds, int):
        return [seeds + i for i in range(count)]
    if seeds is not None:
        if len(seeds) != count:
            raise RecipeError(
                f"{len(seeds)} seeds for {count} pictures", mend="give one per picture, or a single number"
            )
        return [int(seed) for seed in seeds]
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise RecipeError(f"{len(generator)} generators for {count} pictures", mend="give one per picture, or one")
        sources: list[torch.Generator | None] = list(generator)
    else:
        sources = [generator] * count
    return [int(torch.randint(2**32, (1,), generator=g, device=g.device if g else "cpu")) for g in sources]


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [0, 1] to 8-bit pictures, rounded to the nearest."""
    array = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in array]


def _listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _match(negative: TextConditioning, count: int) -> TextConditioning:
    if len(negative) == count:
        return negative
    if len(negative) == 1:
        return negative.repeat(count)
    raise RecipeError(f"{len(negative)} negative prompts for {count} prompts", mend="give one for all, or one each")


def _check_values(
    height: int, width: int, steps: int, scale: float, per_prompt: int, no_cfg_until: int, output_type: str
) -> None:
    checks: list[tuple[bool, str, Any, str]] = [
        (height >= 16 and height % 16 == 0, "height", height, "use a multiple of 16"),
        (width >= 16 and width % 16 == 0, "width", width, "use a multiple of 16"),
        (steps >= 1, "num_inference_steps", steps, "use 1 or more"),
        (math.isfinite(scale) and scale >= 0, "guidance_scale", scale, "use 0 or more; 1 is no guidance"),
        (per_prompt >= 1, "num_images_per_prompt", per_prompt, "use 1 or more"),
        (no_cfg_until >= 0, "no_cfg_until", no_cfg_until, "use 0 or more steps"),
        (output_type in OUTPUT_TYPES, "output_type", output_type, f"use one of {', '.join(OUTPUT_TYPES)}"),
    ]
    for good, name, value, mend in checks:
        if not good:
            raise RecipeError(f"cannot be {value!r}", where=name, mend=mend)
