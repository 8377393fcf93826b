"""`libreflux caption DATA`: captions by a vision-language model."""

from __future__ import annotations

import enum
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from libreflux.printing import counted, say
from libreflux.workflows.caption import CaptionOptions, CaptionResult, caption_with


class Existing(enum.StrEnum):
    """`--existing`."""

    add = "add"
    skip = "skip"
    overwrite = "overwrite"

    @property
    def as_value(self) -> Literal["add", "skip", "overwrite"]:
        """As the workflow takes it."""
        return self.value


class Quantize(enum.StrEnum):
    """`--quantize`."""

    int8 = "int8"

    @property
    def as_value(self) -> Literal["int8"]:
        """As the workflow takes it."""
        return self.value


def caption(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of pictures.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="Vision-language model: a folder or a hub id; with --endpoint its name there."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1. LIBREFLUX_API_KEY in the environment is its "
            "key.",
        ),
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            metavar="NAME[=PROMPT]",
            help="short, long, tags, or a name and a prompt of your own; may be repeated. Default: short and long.",
        ),
    ] = None,
    existing: Annotated[
        Existing,
        typer.Option(
            help="add: captions whose names a picture lacks; skip: leave pictures alone that have other captions; "
            "overwrite: make captions of these names anew."
        ),
    ] = Existing.add,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of an answer, at most.")] = 300,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Of the first answer; 0: the likeliest words.")
    ] = 0.0,
    tries: Annotated[
        int, typer.Option(min=1, max=20, help="How often a question is asked whose answer is of no use, at most.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of answers that are drawn.")] = 0,
    side: Annotated[
        int, typer.Option(min=16, max=8192, help="Pictures are made smaller to this longer side before they are shown.")
    ] = 1024,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Questions at once. Default: 8 at a server or on a card, 1 on a CPU.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an answer of the server may take. Default: 300.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weights of a local model: stored, bf16 or fp32.")] = "stored",
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="int8: the linears of a local model's language part in int8.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Of a local model: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Caption the I-th of N parts only; under torchrun, this process's."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Page of pictures and captions. Default: DATA/.caption/index.html.")
    ] = None,
) -> None:
    """Write captions of pictures into DATA/metadata.jsonl, by a local or a served vision-language model.

    Interrupted or killed, the same command goes on. Captions that are there stay, unless --existing says otherwise.
    """
    from libreflux.cli.progress import progress

    options = CaptionOptions(
        data,
        model=model,
        endpoint=endpoint,
        captions=captions or ("short", "long"),
        existing=existing.as_value,
        max_tokens=max_tokens,
        temperature=temperature,
        tries=tries,
        seed=seed,
        side=side,
        batch=batch,
        timeout=timeout,
        dtype=dtype,
        quantize=None if quantize is None else quantize.as_value,
        device=device,
        shard=shard,
        page=page,
        progress=progress,
    )
    _say_made(caption_with(options))


def _say_made(made: CaptionResult) -> None:
    number, parts = made.part
    part = f" of part {number + 1} of {parts}" if parts > 1 else ""
    kept = f", {made.kept:,} were there" if made.kept else ""
    skipped = f", {counted(made.skipped, 'picture')} with other captions left alone" if made.skipped else ""
    say(f"{counted(made.written, 'caption')} of {counted(made.pictures, 'picture')}{part} written{kept}{skipped}")
    if made.failed:
        why = ", ".join(f"{count} {fault}" for fault, count in sorted(Counter(row[2] for row in made.failed).items()))
        say(f"{counted(len(made.failed), 'caption')} failed ({why}), listed in {made.failures}")
    if made.uncaptioned:
        have = "1 picture has" if made.uncaptioned == 1 else f"{made.uncaptioned:,} pictures have"
        say(f"{have} no caption at all, which prepare refuses: write one by hand, or move them away")
    say(f"{made.file}", f"{made.page}, to be read through")
