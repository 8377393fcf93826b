"""`libreflux generate PROMPT…`: pictures, with true classifier-free guidance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import RecipeError


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Model: a name, a folder or a hub id.")] = "emoji-base",
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="Adapter to put on the model; may be repeated.")
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale, 1 is none; default: the model's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")] = None,
    no_cfg_until: Annotated[int, typer.Option(min=0, help="First steps (a count) that go without guidance.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt, seeds counting up.")] = 1,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    out: Annotated[Path, typer.Option(help="A .png file for one picture, else a folder; replaced.")] = Path("out"),
) -> None:
    """Draw pictures. The same command draws the same bytes, and each PNG says how it was made."""
    for name, size in (("--width", width), ("--height", height)):
        if size is not None and size % 16:
            raise RecipeError(f"{size} is not a multiple of 16", where=name, mend=f"use {round(size / 16) * 16}")
    wanted = [(prompt, seed + index) for prompt in prompts for index in range(count)]
    targets = _targets(out, prompts, wanted)

    import torch

    from libreflux.adapter.files import attach_file
    from libreflux.cli.adapters import adapted_facts, load_arguments
    from libreflux.cli.progress import progress
    from libreflux.files import sha256_file
    from libreflux.model.family import open_model, weights_hash
    from libreflux.sample.metadata import Origin, save_png, versions
    from libreflux.sample.pipeline import LibreFluxPipeline

    files = load_arguments(adapter or ())
    opened = open_model(model, device="cuda" if torch.cuda.is_available() else "cpu")
    assert opened.transformer is not None and opened.vae is not None and opened.path is not None
    opened.facts = adapted_facts(opened.facts, files)
    dtype = str(opened.transformer.dtype).removeprefix("torch.")
    hashes = {"transformer": weights_hash(opened.path)}
    for file, weight in files:
        attach_file(opened.transformer, file.where, weight)
        hashes[f"{Path(file.where).name}:{weight:g}"] = sha256_file(Path(file.where))
    opened.vae.float()  # small beside the transformer, and bf16 would leave bands in flat colours
    pipe = LibreFluxPipeline.from_model(opened)
    pipe.set_progress_bar_config(disable=True)
    facts = opened.facts
    steps = facts.steps if steps is None else steps
    if guidance is None:
        guidance = 1.0 if facts.guidance_embeds else facts.guidance
    embedded = facts.guidance if facts.guidance_embeds else None

    with progress("drawing", "step") as report:
        # One by one: a picture's last bits depend on who shares its batch.
        for index, ((prompt, own_seed), target) in enumerate(zip(wanted, targets, strict=True)):

            def done(step: object, before: int = index * steps, picture: str = f"picture {index + 1}") -> None:
                number: int = step.index  # type: ignore[attr-defined]
                report(before + number + 1, len(wanted) * steps, picture if len(wanted) > 1 else "")

            (image,) = pipe(
                prompt,
                negative,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                no_cfg_until=no_cfg_until,
                embedded_guidance=embedded,
                seeds=[own_seed],
                callback_on_step=done,
            ).images
            origin = Origin(
                prompt=prompt,
                negative=negative,
                seed=own_seed,
                steps=steps,
                guidance=guidance,
                width=image.width,
                height=image.height,
                model=model,
                no_cfg_until=no_cfg_until,
                embedded_guidance=embedded,
                dtype=dtype,
                hashes=hashes,
                versions=versions(),
            )
            save_png(image, target, origin)
            typer.echo(str(target))


def _targets(out: Path, prompts: list[str], wanted: list[tuple[str, int]]) -> list[Path]:
    """Where each picture goes: the one file, or numbered names in a folder.

    Raises:
        RecipeError: several pictures for one file, a file that is no PNG, or a file where a folder is needed.
    """
    if out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise RecipeError(f"{out.suffix} is not written", where=out, mend="name a .png file or a folder")
        if len(wanted) > 1:
            raise RecipeError(f"{len(wanted)} pictures do not fit one file", where=out, mend="name a folder")
        return [out]
    if out.exists() and not out.is_dir():
        raise RecipeError("is a file, not a folder", where=out, mend="name a .png file or a folder")
    count = len(wanted) // len(prompts)
    return [
        out / f"{index // count + 1:03d}-{_slug(prompt)}-seed{seed}.png" for index, (prompt, seed) in enumerate(wanted)
    ]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
