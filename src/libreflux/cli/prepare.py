"""`libreflux prepare DATA…`: pictures and captions to a cache, before or without training."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.errors import RecipeError
from libreflux.printing import counted, say

if TYPE_CHECKING:
    from libreflux.recipe import Recipe


def prepare(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...", help="Folders of captioned pictures, or one recipe (.yaml).", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Cache folder: written, or continued. A recipe names its own.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model whose VAE and text encoders are used.")] = "emoji-base",
    resolution: Annotated[
        list[int] | None, typer.Option(min=16, help="Side of the crops in pixels; repeatable. [default: 128]")
    ] = None,
    crop: Annotated[
        list[str] | None, typer.Option(help="square, aspect or centre; repeatable. [default: square]")
    ] = None,
    text_padding: Annotated[str, typer.Option(help="drop or trim.")] = "drop",
    text_cache: Annotated[
        str, typer.Option(help="bf16; int8: half the disk; none: captions are encoded while training.")
    ] = "bf16",
    text_precision: Annotated[
        str, typer.Option(help="auto, fp32 or bf16: what the text encoders compute in; auto: bf16 on a card.")
    ] = "auto",
    latents: Annotated[
        str, typer.Option(help="mean; sample: the standard deviation too, to draw from in training (twice the disk).")
    ] = "mean",
    crops_per_picture: Annotated[int, typer.Option(min=1, help="Cached crops of each picture.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps: where the encoders run.")] = "auto",
    background: Annotated[str, typer.Option(help="Colour laid under transparent pictures.")] = "white",
    shard: Annotated[
        str | None, typer.Option(help="i/n: only the i-th of n parts, 1/n to n/n, on as many machines.")
    ] = None,
) -> None:
    """Encode pictures and captions once; run again, it continues or finds nothing left to do.

    Under torchrun each process prepares its own part, on its own card. Parts need no merging: who reads the cache
    reads them all.
    """
    from libreflux.recipe import load_recipe

    if len(data) == 1 and data[0].suffix in (".yaml", ".yml"):
        for name in context.params.keys() - {"data", "out", "shard"}:
            said = context.get_parameter_source(name)
            if said is not None and said.name == "COMMANDLINE":
                raise RecipeError("the recipe says this", where=f"--{name.replace('_', '-')}", hint="write it there")
        recipe = load_recipe(data[0], [f"cache={_quoted(out)}"] if out else [])
    else:
        if out is None:
            raise RecipeError("no cache folder is named", where="--out", hint="say --out FOLDER")
        values: dict[str, object] = {"model": model, "text_padding": text_padding}
        values |= {"resolution": resolution or [128], "crop": crop or ["square"]}
        values |= {"text_cache": text_cache, "text_precision": text_precision, "latents": latents}
        values |= {"cache": out, "out": out, "device": device}
        source = {"crops_per_picture": crops_per_picture, "background": background}
        values |= {"steps": 1}  # a recipe has them; preparing does not
        for index, folder in enumerate(data):
            values |= {f"data.{index}.path": folder}
            values |= {f"data.{index}.{key}": value for key, value in source.items()}
        recipe = load_recipe(None, [f"{key}={_quoted(value)}" for key, value in values.items()])
    _prepare(recipe, parse_part(shard))


def parse_part(text: str | None) -> tuple[int, int]:
    """(i, n) from 0 of a part written i/n from 1; of None the process's own under torchrun, else the whole.

    Raises:
        RecipeError: no such part.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"{text!r} is no part", where="--shard", hint="write 1/4 to 4/4 for four parts")
    return int(match[1]) - 1, int(match[2])


def _prepare(recipe: Recipe, part: tuple[int, int]) -> None:
    from libreflux.cli import terminal
    from libreflux.cli.progress import line_width, progress
    from libreflux.data.prepare import prepare_cache
    from libreflux.data.summary import SourceSummary
    from libreflux.model.device import make_current, pick_device
    from libreflux.model.faults import explained

    device = str(pick_device(recipe.device))
    console = terminal.console(err=True)

    def told(found: SourceSummary) -> None:
        for line in found.lines(line_width(console)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    smaller = "a smaller resolution, or device: cpu"
    with progress("preparing", "item", console) as report, explained(f"preparing on {device}", smaller):
        make_current(device)
        _, sources = prepare_cache(recipe, device=device, part=part, progress=report, told=told, read_all=True)
    count = sum(len(samples) for _, samples in sources)
    said = f"{counted(count, 'picture')} prepared in {recipe.cache_dir}"
    if part[1] > 1:
        said += f", part {part[0] + 1} of {part[1]}"
    say(f"{said}; train with cache={recipe.cache_dir}")


def _quoted(value: object) -> str:
    """A value as YAML that is read back to the same text or number."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
