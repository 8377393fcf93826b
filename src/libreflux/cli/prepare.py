"""`libreflux prepare DATA…`: pictures and captions to a cache, before or without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Folders of captioned pictures.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Cache folder: written, or continued.", show_default=False)],
    model: Annotated[str, typer.Option(help="Model whose VAE and text encoders are used.")] = "emoji-base",
    resolution: Annotated[int, typer.Option(min=16, help="Side of the square crops in pixels.")] = 128,
    text_padding: Annotated[str, typer.Option(help="drop or trim.")] = "drop",
    crops_per_picture: Annotated[int, typer.Option(min=1, help="Cached crops of each picture.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps: where the encoders run.")] = "auto",
    background: Annotated[str, typer.Option(help="Colour laid under transparent pictures.")] = "white",
) -> None:
    """Encode pictures and captions once; run again, it continues or finds nothing left to do."""
    from libreflux.recipe import load_recipe

    source = {"crops_per_picture": crops_per_picture, "background": background}
    overrides = {"model": model, "resolution": resolution, "text_padding": text_padding, "cache": out, "out": out}
    overrides |= {"device": device}
    overrides |= {"steps": 1}  # a recipe has them; preparing does not
    for index, folder in enumerate(data):
        overrides |= {f"data.{index}.path": folder}
        overrides |= {f"data.{index}.{key}": value for key, value in source.items()}
    recipe = load_recipe(None, [f"{key}={_quoted(value)}" for key, value in overrides.items()])

    from libreflux.cli.progress import progress
    from libreflux.data.prepare import prepare_recipe
    from libreflux.model.device import pick_device

    with progress("preparing", "item") as report:
        batches = prepare_recipe(recipe, device=str(pick_device(recipe.device)), progress=report)
    typer.echo(f"{len(batches)} pictures prepared in {out}; train with cache={out}")


def _quoted(value: object) -> str:
    """A value as YAML that is read back to the same text or number."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
