"""The parts of a pipeline: where they come from, which facts they bring, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from libreflux.errors import ModelError, RecipeError
from libreflux.model import latents as latent_space
from libreflux.model.device import pick_dtype
from libreflux.model.facts import Facts, facts_of, write_facts
from libreflux.model.int8 import int8_layers
from libreflux.model.locate import CHECKSUMS, PARTS
from libreflux.model.opening import open_model
from libreflux.model.source import ModelSource
from libreflux.model.text import TextEncoders
from libreflux.sample.adapting import Adapting

_PARTS = {*PARTS, "image_encoder", "feature_extractor"}


class FluxParts(Adapting, DiffusionPipeline):
    """What `LibreFluxPipeline` is made of and from; see there."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar[list[str]] = [
        "scheduler",
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "image_encoder",
        "feature_extractor",
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
        image_encoder: None = None,
        feature_extractor: None = None,
    ) -> None:
        super().__init__()
        _check_parts(image_encoder, feature_extractor, scheduler, tokenizer, text_encoder, tokenizer_2, text_encoder_2)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            image_encoder=None,
            feature_extractor=None,
        )
        self._own = facts_of(transformer) if facts is None else facts
        if facts is not None:
            self.facts = facts

    @classmethod
    def from_model(
        cls,
        source: ModelSource,
        *,
        dtype: torch.dtype | str | None = None,
        quantise: bool | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A pipeline with all parts of a model, loaded; a model without text encoders gives one without.

        Args:
            source: see `model.opening.open_model`.
            dtype, quantise, device: see `ModelSource.load_transformer`. The VAE is fp32, see `from_parts`.
        """
        transformer = source.load_transformer(dtype=dtype, quantise=quantise, device=device)
        vae = source.load_vae(dtype=dtype, device=device)
        text = source.load_text(dtype=dtype, device=device) if source.has("text_encoder") else None
        return cls.from_parts(transformer, vae, text, source.facts, source.scheduler)

    @classmethod
    def from_parts(
        cls,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        text: TextEncoders | None = None,
        facts: Facts | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    ) -> Self:
        """A pipeline over parts in memory.

        The VAE becomes fp32: it is small beside the transformer, and bf16 would leave bands in flat colours.

        Args:
            transformer, vae, scheduler, facts: see the class.
            text: None where ready-made conditioning is always passed.
        """
        return cls(
            transformer=transformer,
            vae=vae.float(),
            scheduler=scheduler,
            tokenizer=text and text.tokenizer,
            text_encoder=text and text.text_encoder,
            tokenizer_2=text and text.tokenizer_2,
            text_encoder_2=text and text.text_encoder_2,
            facts=facts,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        quantise: bool | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Open "emoji-base", a folder or a hub id; see `model.opening.open_model`. `torch_dtype` is `dtype` too."""
        chosen = _one_dtype(dtype, torch_dtype)
        return cls.from_model(open_model(name), dtype=chosen, quantise=quantise, device=device)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **given: Any) -> Self:
        """A pipeline over the parts of another one, diffusers' FluxPipeline or this; nothing is copied or cast.

        Args:
            pipeline: its parts are shared, with the adapters that are loaded on them.
            given: other parts, `facts`, or a `dtype` (`torch_dtype`) to cast all parts to, as in diffusers.

        Raises:
            ModelError: it is no pipeline of a FLUX transformer.
        """
        dtype = _one_dtype(given.pop("dtype", None), given.pop("torch_dtype", None))
        parts = {name: one for name, one in pipeline.components.items() if name in _PARTS} | given
        if not isinstance(parts.get("transformer"), FluxTransformer2DModel):
            raise ModelError("has no FLUX transformer", where=type(pipeline).__name__, hint="use a FluxPipeline")
        made = cls(**parts)
        return made if dtype is None else made.to(dtype=dtype)

    @property
    def default_size(self) -> int:
        """Pixels per side that the VAE was made for, in multiples of 16."""
        return self.size_of(self.vae)

    @staticmethod
    def size_of(vae: AutoencoderKL) -> int:
        """Pixels per side that a VAE was made for, in multiples of 16."""
        return latent_space.own_side(vae.config)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """diffusers' own, and the facts beside it, so that `from_pretrained` draws alike.

        Raises:
            ModelError: adapters are loaded, or the transformer is int8.
        """
        self._refuse_adapted()
        if int8_layers(self.transformer):
            hint = "open it with quantise=False, or copy its folder; `libreflux export` writes int8"
            raise ModelError("diffusers does not write int8", where=save_directory, hint=hint)
        super().save_pretrained(save_directory, **options)
        write_facts(Path(save_directory), self.facts)
        (Path(save_directory) / CHECKSUMS).unlink(missing_ok=True)  # of an int8 model that was here before


def _check_parts(image_encoder: object, feature_extractor: object, *others: object) -> None:
    if any(isinstance(one, tuple | list) for one in (image_encoder, feature_extractor, *others)):
        # DiffusionPipeline.from_pipe(pipe, custom_pipeline=...) of diffusers 0.42 passes what its index says of parts
        raise ModelError("diffusers passed a part's name in its place", hint="use LibreFluxPipeline.from_pipe(pipe)")
    if image_encoder is not None or feature_extractor is not None:
        raise ModelError("image prompts are not drawn with", where="image_encoder", hint="pass None")


def _one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What both of diffusers' arguments say; raises RecipeError where they differ, or name no dtype."""
    new, old = pick_dtype(dtype), pick_dtype(torch_dtype, "torch_dtype")
    if None not in (new, old) and new != old:
        raise RecipeError(f"is {new}, torch_dtype {old}", where="dtype", hint="give one of them")
    return new if old is None else old
