"""What the options of `generate`, `remake` and `grid` may be, and what has no effect beside what; loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from libreflux.errors import OptionError
from libreflux.model.compile_choice import Compile
from libreflux.plainjson import is_text
from libreflux.values import check_side, is_guided, is_whole
from libreflux.workflows.model_options import chosen_model

if TYPE_CHECKING:
    from libreflux.model.single_file import SingleFiles
    from libreflux.sample.checks import Arguments

Offload = Literal["auto", "none", "model", "sequential"]
"""What of a model is in memory beside what computes; the pictures are the same bits whichever way.

"auto": the text encoders go before the transformer comes; "none": all stays; "model" and "sequential", on CUDA: every
part waits in RAM and comes whole, or layer by layer.
"""
Quantize = Literal["int8", "w8a8"]
"""How a transformer's weights are kept in memory, whatever is stored.

"int8": in int8, multiplied in the model's own dtype; "w8a8": in int8, multiplied by activations of 8 bits too.
"""

OffloadBlocks = int | Literal["auto"]
"""How many of the transformer's blocks wait in RAM, on CUDA; "auto": as few as the free memory asks for; 0: none."""

MOST_PICTURES = 100_000
"""Of one prompt."""


def listed(values: str | Sequence[str] | None) -> tuple[str, ...]:
    """Texts as a tuple: of one text, of several, or of none."""
    if values is None:
        return ()
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def adapter_texts(adapters: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Adapter arguments as texts, `PATH[:WEIGHT]`: of one, or of several."""
    return tuple(map(str, [adapters] if isinstance(adapters, str | Path) else adapters or ()))


def named_model(model: str | Path | None, base: str | None, comfyui: str | Path | None) -> str | SingleFiles | None:
    """See `chosen_model`."""
    name, folder = None if model is None else str(model), None if comfyui is None else Path(comfyui)
    return chosen_model(name, base, folder)


def check_prompts(prompts: Sequence[object], negative: object) -> None:
    """Raises OptionError where there is nothing to draw, or something that is no text."""
    if not prompts:
        raise OptionError("nothing to draw", "prompts", hint="give one prompt or several")
    check_texts("prompts", prompts)
    check_texts("negative", [negative])


def check_texts(name: str, texts: Sequence[object]) -> None:
    """Raises OptionError for one that is no text, or has no UTF-8."""
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(f"cannot be {text!r}", name, hint="give a text")
        if not is_text(text):
            raise OptionError(f"half a character in {text[:40]!r}", name, hint="write it as UTF-8")


def check_picture(width: int | None, height: int | None, steps: int | None) -> None:
    """Raises OptionError for a size or a number of steps out of range; None is not known yet."""
    from libreflux.sample.checks import check_values

    given: Arguments = {"width": width, "height": height, "num_inference_steps": steps}
    check_values(given, {"num_inference_steps": "steps"})


def check_sides(width: int | None, height: int | None) -> None:
    """Raises OptionError, with the nearest side that can be drawn, for one that cannot."""
    for name, side in (("width", width), ("height", height)):
        if isinstance(side, int):  # what is no whole number, `check_picture` refuses
            check_side(side, name)


def check_memory(offload: str, quantize: str | None, compile: str, offload_blocks: object = 0) -> None:
    """Raises OptionError for a word that is none of `Offload`, `Quantize` or `Compile`, and for no number of blocks."""
    if offload_blocks != "auto":
        check_whole("offload_blocks", offload_blocks, 0)
    if offload_blocks != 0 and offload in ("model", "sequential"):
        what = f"has no effect beside `offload` {offload}"
        raise OptionError(what, "offload_blocks", hint="give one of them")
    for name, value, known in (
        ("offload", offload, get_args(Offload)),
        ("quantize", quantize, get_args(Quantize)),
        ("compile", compile, get_args(Compile)),
    ):
        if value not in known and not (name == "quantize" and value is None):
            raise OptionError(f"cannot be {value!r}", name, hint=f"use one of {', '.join(known)}")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises OptionError for a value that is no whole number of this range."""
    good = is_whole(value) and int(value) >= least
    if not good or (most is not None and value > most):
        hint = f"use a whole number from {least}{'' if most is None else f' to {most}'}"
        raise OptionError(f"cannot be {value!r}", name, hint=hint)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The options of guidance, by their names; a scale that is None is the model's own.

    Attributes:
        guidance, embedded_guidance, no_cfg_until, guidance_start, guidance_stop, guidance_rescale: see
            `GenerateOptions`.
    """

    guidance: float | None
    embedded_guidance: float | None
    no_cfg_until: int
    guidance_start: float
    guidance_stop: float
    guidance_rescale: float


def check_guidance(given: Guidance) -> None:
    """Raises OptionError for numbers of guidance that are out of range, or that say one thing twice."""
    from libreflux.sample.checks import check_values

    values: Arguments = {
        "guidance_scale": given.guidance,
        "embedded_guidance": given.embedded_guidance,
        "guidance_start": given.guidance_start,
        "guidance_stop": given.guidance_stop,
        "guidance_rescale": given.guidance_rescale,
        "no_cfg_until": given.no_cfg_until,
    }
    check_values(values, {"guidance_scale": "guidance"})
    if given.no_cfg_until and given.guidance_start:
        raise OptionError("does what `guidance_start` does", "no_cfg_until", hint="give one of them")


def refuse_unused(guidance: float | None, effects: Mapping[str, object]) -> None:
    """Raises OptionError for an option that a guidance scale of 0 or 1 leaves without effect; None is not known yet."""
    for name, given in effects.items():
        if given and guidance is not None and not is_guided(guidance):
            hint = "add `guidance` 3, or remove it"
            raise OptionError(f"has no effect at guidance {guidance:g}", name, hint=hint)


def refuse_unguided(steps: int, no_cfg_until: int, start: float, stop: float) -> None:
    """Raises OptionError if no step is left to guide: guidance and negative prompt would do nothing."""
    if no_cfg_until >= steps:
        hint = f"use at most {steps - 1}, or `guidance` 1 instead" if steps > 1 else "remove it, or use more `steps`"
        raise OptionError(f"leaves no step of {steps} guided", "no_cfg_until", hint=hint)

    from libreflux.sample.draw_settings import guided_steps

    guided_steps(steps, no_cfg_until, start, stop)
