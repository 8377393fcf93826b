"""What may be said of an inspection of attention, and what is refused before a model is known; loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.errors import OptionError
from libreflux.workflows import picture_options
from libreflux.workflows.generate_options import GenerateOptions, check_numbers, texts_of_options
from libreflux.workflows.picture_options import Offload, OffloadBlocks, Quantize, listed
from libreflux.workflows.progress import Progress, silent

PADDINGS = ("drop", "trim", "bias", "keep")


@dataclass(frozen=True)
class InspectAttentionOptions:
    """Which model is looked into, and while it draws what.

    Attributes:
        model: a name, a folder, a .safetensors file or a hub id.
        prompts: what is drawn: one prompt, or several.
        adapters, base, comfyui: see `GenerateOptions`.
        text_padding: "drop", "trim", "bias" or "keep", for this inspection alone; None is the model's own.
        tokens: words of the prompts, or numbers of text tokens as texts, whose places in the picture are shown; () is
            all words and the padding that is read most.
        causal: whether the text is also changed, its padding taken out for one, and what becomes of the picture
            measured; that takes several times as long.
        negative, guidance, steps, max_tokens, width, height: see `GenerateOptions`.
        seed: of each prompt's picture.
        device, quantize, offload, offload_blocks: see `GenerateOptions`.
        out: folder of the page, the numbers and the pictures; one that this made before is written anew. None is
            out/attention/NAME.
        progress: shows how far it is, see `workflows.progress`.
    """

    model: str | Path
    prompts: str | Sequence[str]
    _: KW_ONLY
    adapters: str | Path | Sequence[str | Path] = ()
    base: str | None = None
    comfyui: str | Path | None = None
    text_padding: str | None = None
    tokens: str | Sequence[str] = ()
    causal: bool = True
    negative: str = ""
    guidance: float | None = None
    steps: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    quantize: Quantize | None = None
    offload: Offload = "auto"
    offload_blocks: OffloadBlocks = 0
    out: str | Path | None = None
    progress: Progress = field(default=silent, repr=False, compare=False)

    def as_pictures(self) -> GenerateOptions:
        """What is drawn, as `generate` draws it."""
        return GenerateOptions(
            self.prompts,
            negative=self.negative,
            guidance=self.guidance,
            steps=self.steps,
            max_tokens=self.max_tokens,
            seed=self.seed,
            width=self.width,
            height=self.height,
            quantize=self.quantize,
            offload=self.offload,
            offload_blocks=self.offload_blocks,
        )


def check_options(options: InspectAttentionOptions) -> tuple[str, ...]:
    """The prompts, once what can be refused without a model is.

    Raises:
        OptionError: nothing to draw, or a value out of range.
    """
    pictures = options.as_pictures()
    prompts, _ = texts_of_options(pictures)
    if options.text_padding is not None and options.text_padding not in PADDINGS:
        hint = f"use one of {', '.join(PADDINGS)}"
        raise OptionError(f"cannot be {options.text_padding!r}", "text_padding", hint=hint)
    picture_options.check_texts("tokens", listed(options.tokens))
    if any(not one.strip() for one in listed(options.tokens)):
        raise OptionError("is empty", "tokens", hint="name a word of the prompt, or the number of a text token")
    if len(set(prompts)) < len(prompts):
        raise OptionError("has a prompt twice", "prompts", hint="remove one of them")
    check_numbers(pictures)
    return prompts
