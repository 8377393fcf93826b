"""What is asked of `generate` and `generate_folder`, and what is refused before a model is known; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from libreflux.errors import OptionError
from libreflux.model.compile_choice import Compile
from libreflux.printing import counted
from libreflux.values import listed_numbers
from libreflux.workflows import picture_options
from libreflux.workflows.guidance_options import (
    GuidanceOptions,
    check_first_steps,
    check_nag,
    check_rule,
    check_zero_init,
    reads_negative,
)
from libreflux.workflows.picture_options import Offload, OffloadBlocks, Quantize, listed
from libreflux.workflows.progress import Progress, silent

if TYPE_CHECKING:
    from libreflux.model.facts import Facts


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(GuidanceOptions):
    """How pictures are drawn: what is said of one picture, of several and of a whole folder.

    Attributes:
        model: a name, a folder, a .safetensors file or a hub id; None: what the first adapter is for, or emoji-libre.
        base: model that has what a single file lacks, tokenizers for one.
        comfyui: folder with flux1-*, t5xxl*, clip_l* and ae* files, such as ComfyUI's models.
        adapters: adapter files or run folders, each perhaps with a weight: "runs/first:0.8".
        negative: negative prompt.
        negative_2: what T5 reads instead, while CLIP reads the negative prompt.
        max_tokens: T5 tokens that a prompt may have; None is the model's own, the most.
        guidance: guidance scale, 0 and 1 are none; None is the model's own.
        embedded_guidance: of a guidance-distilled model (FLUX.1-dev); None is the model's own.
        steps: sampling steps; None is the model's own.
        sigmas: a ladder instead of `steps`: falling in (0, 1], without the last 0; the model's shift applies.
        no_cfg_until: first steps (a count) that go without guidance.
        guidance_start, guidance_stop: the interval of guidance, as fractions of the steps.
        guidance_rescale: take back the contrast that guidance adds (Lin et al. 2023): 0 none, 1 all.
        batch_cfg: guided steps as one pass (True) or two (False); "auto": one where prompts are equally long.
        width, height: pixels, multiples of 16; None is the model's own size.
        tile: decode in tiles, in less memory; None: above 1536 pixels.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        quantize: "int8" quantises the transformer while it is read, "w8a8" its activations too; None: as stored.
        offload: what of the model is in memory beside what computes, see `picture_options.Offload`.
        offload_blocks: of the transformer that wait in RAM, see `picture_options.OffloadBlocks`.
        compile: "on" compiles the transformer's blocks, which takes a minute or more and changes last bits; "auto" does
            on a card, if that saves time.
        metadata: whether a PNG says how it was made.
        progress: shows how far it is, see `workflows.progress`.
        on_picture: told of each picture's file once it is written.
        on_notice: told whether blocks are compiled, and of what was.
    """

    model: str | Path | None = None
    base: str | None = None
    comfyui: str | Path | None = None
    adapters: str | Path | Sequence[str | Path] = ()
    negative: str = ""
    negative_2: str | None = None
    max_tokens: int | None = None
    guidance: float | None = None
    embedded_guidance: float | None = None
    steps: int | None = None
    sigmas: Sequence[float] | None = None
    no_cfg_until: int = 0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_rescale: float = 0.0
    batch_cfg: bool | Literal["auto"] = "auto"
    width: int | None = None
    height: int | None = None
    tile: bool | None = None
    device: str = "auto"
    quantize: Quantize | None = None
    offload: Offload = "auto"
    offload_blocks: OffloadBlocks = 0
    compile: Compile = "auto"
    metadata: bool = True
    progress: Progress = field(default=silent, repr=False, compare=False)
    on_picture: Callable[[Path], None] | None = field(default=None, repr=False, compare=False)
    on_notice: Callable[[str], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", listed_numbers(self.sigmas, "sigmas", distinct=False))


@dataclass(frozen=True)
class GenerateOptions(DrawingOptions):
    """What to draw, and how.

    Attributes:
        prompts: what to draw: one prompt, or several.
        prompt_2: what T5 reads instead while CLIP reads the prompt: one for each prompt.
        seed: of each prompt's first picture.
        count: pictures for each prompt, seeds counting up.
        out: a .png file for one picture, else a folder; replaced. None writes nothing: the result has the pictures.
    """

    prompts: str | Sequence[str]
    _: KW_ONLY
    prompt_2: str | Sequence[str] | None = None
    seed: int = 0
    count: int = 1
    out: str | Path | None = None


def texts_of_options(options: GenerateOptions) -> tuple[tuple[str, ...], Sequence[str | None]]:
    """The prompts, and what T5 reads instead of each, None where that is the prompt.

    Raises:
        OptionError: nothing to draw, texts that do not agree in number, or an option that is out of range.
    """
    prompts = listed(options.prompts)
    picture_options.check_prompts(prompts, options.negative)
    picture_options.check_whole("seed", options.seed, 0)
    picture_options.check_whole("count", options.count, 1, picture_options.MOST_PICTURES)
    check_words(options)
    seconds = listed(options.prompt_2)
    picture_options.check_texts("prompt_2", seconds)
    if seconds and len(seconds) != len(prompts):
        what = f"{len(seconds)} for {counted(len(prompts), 'prompt')}"
        raise OptionError(what, "prompt_2", hint="give one for each `prompts`")
    return prompts, seconds or [None] * len(prompts)


def check_words(options: DrawingOptions) -> None:
    """Raises OptionError for sides, words and texts that there are not; needs no torch."""
    picture_options.check_sides(options.width, options.height)
    picture_options.check_memory(options.offload, options.quantize, options.compile, options.offload_blocks)
    picture_options.check_texts("negative_2", listed(options.negative_2))


def check_numbers(options: DrawingOptions) -> None:
    """Raises OptionError for numbers that no model can draw with, and for options that have no effect beside others."""
    from libreflux.sample.checks import check_values

    picture_options.check_picture(options.width, options.height, options.steps)
    given = picture_options.Guidance(
        guidance=options.guidance,
        embedded_guidance=options.embedded_guidance,
        no_cfg_until=options.no_cfg_until,
        guidance_start=options.guidance_start,
        guidance_stop=options.guidance_stop,
        guidance_rescale=options.guidance_rescale,
    )
    picture_options.check_guidance(given)
    check_rule(options)
    check_nag(options, options.compile)
    check_first_steps(options, given_steps(options))
    check_values({"batch_cfg": options.batch_cfg, "tile": options.tile})
    picture_options.refuse_unused(options.guidance, guided_only(options))
    if options.sigmas is not None:
        if options.steps is not None:
            raise OptionError("has no effect beside `sigmas`", "steps", hint="give one of them")
        check_values({"sigmas": list(options.sigmas)})
    if (steps := given_steps(options)) is not None:
        check_zero_init(options, steps)
        picture_options.refuse_unguided(steps, options.no_cfg_until, options.guidance_start, options.guidance_stop)


def given_steps(options: DrawingOptions) -> int | None:
    """Sampling steps as given, by a number or a ladder; None is the model's own."""
    return options.steps if options.sigmas is None else len(options.sigmas)


def guided_only(options: DrawingOptions, first: Facts | None = None) -> dict[str, object]:
    """Options that do something where a picture is guided alone, each with whether it was given.

    Args:
        options: of the picture.
        first: facts of the model that draws the first steps; None where there is none, or it is not known yet.
    """
    elsewhere = reads_negative(options, first)
    return {
        "negative": options.negative and not elsewhere,
        "no_cfg_until": options.no_cfg_until,
        "guidance_start": options.guidance_start,
        "guidance_stop": options.guidance_stop != 1,
        "guidance_rescale": options.guidance_rescale,
        "guidance_rule": options.guidance_rule != "cfg",
        "batch_cfg": options.batch_cfg != "auto",
        "negative_2": options.negative_2 is not None and not elsewhere,
    }
