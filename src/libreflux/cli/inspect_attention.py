"""`libreflux inspect attention MODEL PROMPT…`: what a model looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from libreflux.cli.options import (
    Base,
    ComfyUI,
    Offload,
    OffloadBlocksOption,
    OffloadOption,
    QuantizeOption,
    block_number,
)
from libreflux.printing import say, say_json


def attention(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a name, a folder or a hub id.", show_default=False)
    ],
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="What is drawn meanwhile; quote each prompt.", show_default=False),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."
        ),
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    text_padding: Annotated[
        str | None,
        typer.Option(metavar="drop|trim|bias|keep", help="In place of the model's own, for this inspection alone."),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--token",
            metavar="WORD|N",
            help="Show where in the picture this word, or the text token of this number, is read; may be repeated; "
            "default: all words, and the padding that is read most.",
            show_default=False,
        ),
    ] = None,
    no_causal: Annotated[
        bool, typer.Option("--no-causal", help="Only record: the text is not changed. Several times as fast.")
    ] = False,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="T5 tokens that a prompt may have; default: the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of each prompt's picture.")] = 0,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16; default: the model's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: QuantizeOption = None,
    offload: OffloadOption = Offload.auto,
    offload_blocks: OffloadBlocksOption = "0",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; default: out/attention/NAME.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Record what a model looks at: how much attention its image tokens give to every text token.

    By step, block and head, with a page that shows it, and where in the picture each word is read. Then the text is
    changed, its padding taken out for one, and what becomes of the picture is measured.
    """
    from libreflux.cli.progress import progress
    from libreflux.workflows.inspect_attention import InspectAttentionOptions, inspect_attention_with

    options = InspectAttentionOptions(
        model,
        prompts,
        adapters=adapters or (),
        base=base,
        comfyui=comfyui,
        text_padding=text_padding,
        tokens=tokens or (),
        causal=not no_causal,
        negative=negative,
        guidance=guidance,
        steps=steps,
        max_tokens=max_tokens,
        seed=seed,
        width=width,
        height=height,
        device=device,
        quantize=None if quantize is None else quantize.as_value,
        offload=offload.as_value,
        offload_blocks=block_number(offload_blocks),
        out=out,
        progress=progress,
    )
    found = inspect_attention_with(options)
    if json:
        say_json(found.file.read_text(encoding="utf-8"))
        return
    say(found.told)
    say(f"page: {found.page}")
