"""What may be said of captions that are to be made, and what is refused before anything is loaded. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from libreflux.errors import OptionError
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent

Existing = Literal["add", "skip", "overwrite"]
"""What becomes of pictures that have captions.

"add": each gets the captions whose names it lacks; what is there stays. "skip": pictures that have captions of other
names, or without a name, are left alone. "overwrite": captions of these names that were not made in exactly this way
are made anew.
"""
PRECISIONS = ("stored", "bf16", "fp32")
_RANGES = {
    "max_tokens": (1, 4096),
    "tries": (1, 20),
    "seed": (0, None),
    "side": (16, 8192),
    "batch": (1, 1024),
}
MOST_SECONDS = 86_400.0


@dataclass(frozen=True)
class CaptionOptions:
    """Which captions, by whom, and how.

    Attributes:
        data: folder of pictures; captions are written into its metadata.jsonl.
        model: a vision-language model of transformers, a folder or a hub id; with `endpoint` its name at the server,
            None: the only one there.
        endpoint: an OpenAI-compatible server, e.g. "http://127.0.0.1:8000/v1". A key that it wants is read from the
            environment, LIBREFLUX_API_KEY.
        captions: "short", "long", "tags", or "name=prompt"; or prompts by their names.
        existing: "add": captions that a picture lacks; "skip": none for pictures that have others; "overwrite".
        max_tokens: of an answer, at most.
        temperature: of the first answer; 0: the likeliest words.
        tries: how often a question is asked whose answer is of no use, at most.
        seed: of answers that are drawn.
        side: longer side in pixels that a picture is made smaller to before it is shown; smaller ones stay.
        batch: questions at once; None: 8 at a server or on a card, 1 on a CPU.
        timeout: seconds that an answer of the server may take; None: 300.
        dtype: of a local model's weights: "stored", "bf16" or "fp32".
        quantize: "int8": the linears of a local model's language part in int8.
        device: of a local model: "auto", "cpu", "cuda", "cuda:N" or "mps".
        shard: "i/n": the i-th of n parts alone, "1/n" to "n/n"; None: under torchrun this process's own, else all.
        page: the page of pictures and captions, an .html file, which is replaced; None: index.html in the hidden folder
            .caption of `data`.
        progress: shows how far it is.
    """

    data: Path | str
    _: KW_ONLY
    model: str | None = None
    endpoint: str | None = None
    captions: str | Sequence[str] | Mapping[str, str] = ("short", "long")
    existing: Existing = "add"
    max_tokens: int = 300
    temperature: float = 0.0
    tries: int = 3
    seed: int = 0
    side: int = 1024
    batch: int | None = None
    timeout: float | None = None
    dtype: str = "stored"
    quantize: Literal["int8"] | None = None
    device: str = "auto"
    shard: str | None = None
    page: Path | str | None = None
    progress: Progress = field(default=silent, repr=False, compare=False)


def check_options(options: CaptionOptions) -> None:
    """Refuses what can be refused without a model.

    Raises:
        OptionError: nobody to ask, a value out of range, or an option that has no effect.
    """
    if options.model is None and options.endpoint is None:
        hint = "name a vision-language model, or the `endpoint` of a server"
        raise OptionError("is not named", "model", hint=hint)
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        if value is not None:
            check_whole(name, value, least, most)
    _check_number("temperature", options.temperature, 0.0, 2.0)
    if options.timeout is not None:
        _check_number("timeout", options.timeout, 1.0, MOST_SECONDS)
    if options.existing not in get_args(Existing):
        raise OptionError(f"cannot be {options.existing!r}", "existing", hint="use add, skip or overwrite")
    if options.dtype not in PRECISIONS:
        raise OptionError(f"{options.dtype!r} is no precision", "dtype", hint="use stored, bf16 or fp32")
    if options.quantize not in (None, "int8"):
        raise OptionError(f"cannot be {options.quantize!r}", "quantize", hint="use int8, or leave it out")
    if options.page is not None and Path(options.page).suffix.lower() not in (".html", ".htm", ""):
        raise OptionError(f"{str(options.page)!r} is no page", "page", hint="name a file that ends in .html")
    _check_idle(options)


def _check_idle(options: CaptionOptions) -> None:
    """Refuses what nothing would read."""
    if options.endpoint is None:
        if options.timeout is not None:
            raise OptionError("has no effect without `endpoint`", "timeout", hint="remove it")
        return
    given = {
        "dtype": options.dtype != "stored",
        "quantize": options.quantize is not None,
        "device": options.device != "auto",
    }
    for name, is_given in given.items():
        if is_given:
            raise OptionError("has no effect with `endpoint`", name, hint="remove it: the server has the model")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not plain or not least <= value <= most:  # type: ignore[operator]
        raise OptionError(f"cannot be {value!r}", name, hint=f"use a number from {least:g} to {most:g}")
