"""`libreflux generate PROMPT…`: pictures, with true classifier-free guidance."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from libreflux.errors import RecipeError


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model: a name, a folder or a hub id; default: emoji-libre, or what the adapter is for."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."),
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    out: Annotated[Path, typer.Option(help="A .png file for one picture, else a folder; replaced.")] = Path("out"),
) -> None:
    """Draw pictures. The same command draws the same bytes, and each PNG says how it was made."""
    for name, size in (("--width", width), ("--height", height)):
        if size is not None and size % 16:
            raise RecipeError(f"{size} is not a multiple of 16", where=name, mend=f"use {round(size / 16) * 16}")
    wanted = [(prompt, seed + index) for prompt in prompts for index in range(count)]
    targets = _targets(out, prompts, wanted)
    _refuse_unused(guidance, negative, no_cfg_until)
    if steps is not None:
        _refuse_unguided(steps, no_cfg_until)  # before anything is loaded

    from libreflux.cli.adapters import default_model
    from libreflux.cli.drawing import open_for_drawing
    from libreflux.cli.progress import progress
    from libreflux.flow.solve import Step
    from libreflux.sample.metadata import Origin, save_png, versions

    model = model or default_model(adapter or ())
    opened = open_for_drawing(model, adapter or (), device)
    facts = opened.facts
    steps = facts.steps if steps is None else steps
    _refuse_unguided(steps, no_cfg_until)
    if guidance is None:
        guidance = 1.0 if facts.guidance_embeds else facts.guidance
        _refuse_unused(guidance, negative, no_cfg_until)
    embedded = facts.guidance if facts.guidance_embeds else None
    drawn = 0

    with progress("drawing", "step") as report:

        def on_step(step: Step) -> None:
            note = f"picture {drawn + 1}" if len(wanted) > 1 else ""
            report(drawn * steps + step.index + 1, len(wanted) * steps, note)

        # One by one: a picture's last bits depend on who shares its batch.
        for (prompt, own_seed), target in zip(wanted, targets, strict=True):
            (image,) = opened.pipe(
                prompt,
                negative,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                no_cfg_until=no_cfg_until,
                embedded_guidance=embedded,
                seeds=[own_seed],
                callback_on_step=on_step,
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
                dtype=opened.dtype,
                hashes=opened.hashes,
                adapters=opened.adapters,
                versions=versions(),
            )
            save_png(image, target, origin)
            typer.echo(str(target))
            drawn += 1


def _refuse_unused(guidance: float | None, negative: str, no_cfg_until: int) -> None:
    """Raises RecipeError for an option that a guidance scale of 1 leaves without effect; None is not known yet."""
    for name, given in (("--negative", negative), ("--no-cfg-until", no_cfg_until)):
        if given and guidance == 1:
            raise RecipeError("has no effect at guidance 1", where=name, mend="add --guidance 3, or remove it")


def _refuse_unguided(steps: int, no_cfg_until: int) -> None:
    """Raises RecipeError if no step is left to guide: guidance and negative prompt would do nothing."""
    if no_cfg_until >= steps:
        mend = f"use at most {steps - 1}, or --guidance 1 instead" if steps > 1 else "remove it, or use more --steps"
        raise RecipeError(f"leaves none of {steps} steps guided", where="--no-cfg-until", mend=mend)


def _targets(out: Path, prompts: list[str], wanted: list[tuple[str, int]]) -> list[Path]:
    """Where each picture goes: the one file, or numbered names in a folder.

    Raises:
        RecipeError: several pictures for one file, a file that is no PNG, or a file where a folder is needed.
    """
    above = next((folder for folder in out.absolute().parents if os.path.lexists(folder)), Path("/"))
    if not above.is_dir():
        raise RecipeError("is a file, not a folder", where=above, mend="name another place with --out")
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
