"""Options of the verbs that draw, whose values are words."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from libreflux.errors import OptionError


class Batch(enum.StrEnum):
    """`--batch-cfg`."""

    auto = "auto"
    on = "on"
    off = "off"

    @property
    def as_value(self) -> bool | Literal["auto"]:
        """As `LibreFluxPipeline` takes it."""
        return "auto" if self is Batch.auto else self is Batch.on


class Offload(enum.StrEnum):
    """`--offload`: what of a model is in memory beside what computes. The pictures are the same bits whichever way."""

    auto = "auto"
    none = "none"
    model = "model"
    sequential = "sequential"

    @property
    def as_value(self) -> Literal["auto", "none", "model", "sequential"]:
        """As workflows take it."""
        return self.value


class Quantize(enum.StrEnum):
    """`--quantize`: how a transformer's weights are kept in memory, whatever is stored."""

    int8 = "int8"
    w8a8 = "w8a8"

    @property
    def as_value(self) -> Literal["int8", "w8a8"]:
        """As workflows take it."""
        return self.value


class Compile(enum.StrEnum):
    """`--compile`: whether the transformer's blocks are compiled."""

    auto = "auto"
    on = "on"
    off = "off"

    @property
    def as_value(self) -> Literal["auto", "on", "off"]:
        """As workflows take it."""
        return self.value


CompileOption = Annotated[
    Compile,
    typer.Option(
        help="on: compile the transformer's blocks first, which takes a minute or more and changes last bits; auto: on "
        "a card if that saves time; a picture that is drawn again: as it was."
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="int8: quantise the transformer tensor by tensor while it is read; a quarter of fp32's memory, half of "
        "bf16's; w8a8: its activations have 8 bits too, which is faster and less exact. Default: as stored.",
        show_default=False,
    ),
]
OffloadOption = Annotated[
    Offload,
    typer.Option(
        help="auto: the text encoders go before the transformer comes; none: all stays; on CUDA also model or "
        "sequential: every part waits in RAM and comes whole, or layer by layer."
    ),
]
OffloadBlocksOption = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        help="Blocks of the transformer that wait in RAM and come to a CUDA card in turn; auto: as few as its free "
        "memory asks for.",
    ),
]


def block_number(text: str) -> int | Literal["auto"]:
    """What `--offload-blocks` says.

    Raises:
        OptionError: neither a whole number nor auto.
    """
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdigit():
        raise OptionError(f"cannot be {text!r}", "offload_blocks", hint="use a whole number, or auto")
    return int(text)


Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Model that has what a single file lacks, tokenizers for one."),
]
ComfyUI = Annotated[
    Path | None,
    typer.Option(
        "--comfyui", metavar="DIR", help="Folder with flux1-*, t5xxl*, clip_l* and ae* files, such as ComfyUI's models."
    ),
]
