"""`libreflux generate PROMPT…`: pictures, with true classifier-free guidance."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli.options import Base, Batch, ComfyUI, Offload, OffloadOption, QuantizeOption
from libreflux.errors import RecipeError, RunError
from libreflux.places import file_place
from libreflux.printing import counted, say
from libreflux.values import check_side, number_list
from libreflux.workflows.models import chosen_model

if TYPE_CHECKING:
    from libreflux.cli.drawing import Opened
    from libreflux.model.facts import Facts
    from libreflux.sample.metadata import GenerationRecord

REMAKE_TAKES = ("remake", "model", "base", "comfyui", "adapter", "device", "offload", "no_metadata", "out")


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model: a name, a folder or a hub id; default: emoji-libre, or what the adapter is for."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:WEIGHT]", help="Adapter file or run folder, put on the model; may be repeated."),
    ] = None,
    prompt_2: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What T5 reads instead, while CLIP reads PROMPT; one for each.", show_default=False
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    negative_2: Annotated[
        str | None,
        typer.Option(help="What T5 reads instead, while CLIP reads the negative prompt.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="T5 tokens that a prompt may have; default: the model's own, the most.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale, 1 and below is none; default: the model's own.")
    ] = None,
    embedded_guidance: Annotated[
        float | None, typer.Option(min=0, help="Of a guidance-distilled model (FLUX.1-dev); default: the model's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the model's own.")] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="1,0.75,0.5,0.25",
            show_default=False,
            help="An own ladder instead of --steps: falling, without the last 0; the model's shift applies.",
        ),
    ] = None,
    no_cfg_until: Annotated[int, typer.Option(min=0, help="First steps (a count) that go without guidance.")] = 0,
    guidance_start: Annotated[float, typer.Option(help="Guide from this fraction of the steps on, 0 to 1.")] = 0.0,
    guidance_stop: Annotated[float, typer.Option(help="Guide up to this fraction of the steps, 0 to 1.")] = 1.0,
    guidance_rescale: Annotated[
        float, typer.Option(help="Take back the contrast that guidance adds (Lin et al. 2023): 0 none, 1 all.")
    ] = 0.0,
    batch_cfg: Annotated[
        Batch,
        typer.Option(help="Guided steps as one pass (on) or two (off); auto: one where prompts are equally long."),
    ] = Batch.auto,
    seed: Annotated[int, typer.Option(min=0, help="Seed of each prompt's first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Pictures per prompt, seeds counting up.")] = 1,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    tile: Annotated[
        bool | None,
        typer.Option(
            "--tile/--no-tile", help="Decode in tiles, in less memory; default: above 1536 pixels.", show_default=False
        ),
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: QuantizeOption = None,
    offload: OffloadOption = Offload.auto,
    remake: Annotated[
        Path | None,
        typer.Option(
            metavar="PIC.png", help="Draw this picture again, from what it says of itself.", show_default=False
        ),
    ] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Leave out of the PNG how it was made.")] = False,
    out: Annotated[Path, typer.Option(help="A .png file for one picture, else a folder; replaced.")] = Path("out"),
) -> None:
    """Draw pictures. The same command draws the same bytes, and each PNG says how it was made."""
    if remake is not None:
        _refuse_beside_remake(context)
        from libreflux.cli.remake import draw_again

        draw_again(
            remake, model, adapter or (), device, out, offload=offload, base=base, comfyui=comfyui,
            with_metadata=not no_metadata,
        )  # fmt: skip
        return
    if not prompts:
        hint = "quote what to draw, or give --remake PIC.png; see libreflux generate --help"
        raise RecipeError("nothing to draw", where="PROMPT", hint=hint)
    check_side(width, "--width")
    check_side(height, "--height")
    if prompt_2 and len(prompt_2) != len(prompts):
        what = f"{len(prompt_2)} for {counted(len(prompts), 'prompt')}"
        raise RecipeError(what, where="--prompt-2", hint="give one for each PROMPT")
    wanted = [(prompt, seed + index) for prompt in prompts for index in range(count)]
    targets = picture_targets(out, prompts, wanted)
    effects = {
        "--negative": negative, "--no-cfg-until": no_cfg_until, "--guidance-start": guidance_start,
        "--guidance-stop": guidance_stop != 1, "--guidance-rescale": guidance_rescale,
        "--batch-cfg": batch_cfg is not Batch.auto, "--negative-2": negative_2 is not None,
    }  # fmt: skip
    check_picture(width, height, steps)
    _check_guidance(guidance, embedded_guidance, guidance_start, guidance_stop, guidance_rescale, no_cfg_until)
    _refuse_unused(guidance, effects)
    ladder = None if sigmas is None else _ladder(sigmas, steps)
    steps = steps if ladder is None else len(ladder)
    if steps is not None:
        _refuse_unguided(steps, no_cfg_until, guidance_start, guidance_stop)  # before anything is loaded

    from libreflux.cli.drawing import open_for_drawing
    from libreflux.sample.encoding import check_max_tokens
    from libreflux.sample.metadata import GenerationRecord
    from libreflux.workflows.adapters import default_model

    source = chosen_model(model, base, comfyui) or default_model(adapter or ())
    chosen = open_for_drawing(source, adapter or (), device, offload, "int8" if quantize else None)
    facts, size = chosen.facts, chosen.size
    check_max_tokens(facts, max_tokens, "--max-tokens")
    embedded_guidance = _embedded(facts, embedded_guidance)
    steps = facts.steps if steps is None else steps
    check_picture(width or size, height or size, steps)
    if guidance is None:
        guidance = 1.0 if facts.guidance_embeds else facts.guidance
        _refuse_unused(guidance, effects)
    _refuse_unguided(steps, no_cfg_until, guidance_start, guidance_stop)
    common = GenerationRecord(
        prompt="", seed=0, negative=negative, steps=steps, guidance=guidance, width=width or size,
        height=height or size, model=str(source), no_cfg_until=no_cfg_until, guidance_start=guidance_start,
        guidance_stop=guidance_stop, guidance_rescale=guidance_rescale, batch_cfg=batch_cfg.as_value, tile=tile,
        embedded_guidance=embedded_guidance, quantize=chosen.quantize,
        negative_2=negative_2, max_tokens=max_tokens, sigmas=ladder,
    )  # fmt: skip
    records = [
        dataclasses.replace(common, prompt=prompt, prompt_2=prompt_2[index // count] if prompt_2 else None, seed=own)
        for index, (prompt, own) in enumerate(wanted)
    ]
    opened = chosen.load(records)
    stamped = [opened.stamped(record) for record in records]
    _draw_all(opened, list(zip(stamped, targets, strict=True)), with_metadata=not no_metadata)


def _draw_all(opened: Opened, wanted: list[tuple[GenerationRecord, Path]], *, with_metadata: bool) -> None:
    from libreflux.cli.progress import progress
    from libreflux.flow.solve import Step
    from libreflux.sample.metadata import save_png

    total = sum(record.steps for record, _ in wanted)
    done = 0
    with progress("drawing", "step") as report:
        for index, (record, target) in enumerate(wanted):
            note = f"picture {index + 1}" if len(wanted) > 1 else ""

            def on_step(step: Step, done: int = done, note: str = note) -> None:
                report(done + step.index + 1, total, note)

            save_png(opened.draw(record, on_step), target, record if with_metadata else None)
            say(target)
            done += record.steps


def check_picture(width: int | None, height: int | None, steps: int | None) -> None:
    """Raises RecipeError for a size or a number of steps out of range; None is not known yet."""
    from libreflux.sample.checks import check_values

    given = {"width": width, "height": height, "num_inference_steps": steps}
    check_values(given, {"width": "--width", "height": "--height", "num_inference_steps": "--steps"})


def _check_guidance(
    scale: float | None, embedded: float | None, start: float, stop: float, rescale: float, no_cfg_until: int
) -> None:
    from libreflux.sample.checks import check_values

    given = {
        "guidance_scale": scale, "embedded_guidance": embedded, "guidance_start": start, "guidance_stop": stop,
        "guidance_rescale": rescale,
    }  # fmt: skip
    names = {name: f"--{name.replace('_', '-')}" for name in given} | {"guidance_scale": "--guidance"}
    check_values(given, names)
    if no_cfg_until and start:
        raise RecipeError("does what --guidance-start does", where="--no-cfg-until", hint="give one of them")


def _ladder(text: str, steps: int | None) -> list[float]:
    """The numbers of `--sigmas`."""
    from libreflux.sample.checks import check_values

    if steps is not None:
        raise RecipeError("has no effect beside --sigmas", where="--steps", hint="give one of them")
    sigmas = list(number_list(text, "--sigmas", distinct=False))
    check_values({"sigmas": sigmas}, {"sigmas": "--sigmas"})
    return sigmas


def _embedded(facts: Facts, given: float | None) -> float | None:
    """The embedded guidance: as given, the model's own, or None for a model that has none."""
    if given is not None and not facts.guidance_embeds:
        what = "has no effect on a model without guidance embedding"
        raise RecipeError(what, where="--embedded-guidance", hint="use --guidance")
    return facts.guidance if facts.guidance_embeds and given is None else given


def _refuse_beside_remake(context: typer.Context) -> None:
    """Raises RecipeError for an option whose value the picture itself gives."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name != "DEFAULT" and context.params[name] not in (None, [], ())
        if given and name not in REMAKE_TAKES:
            what = "PROMPT" if name == "prompts" else f"--{name.replace('_', '-')}"
            raise RecipeError("has no effect beside --remake", where=what, hint="remove it: the picture says it")


def _refuse_unused(guidance: float | None, effects: Mapping[str, object]) -> None:
    """Raises RecipeError for an option that a guidance scale of 1 leaves without effect; None is not known yet."""
    for name, given in effects.items():
        if given and guidance is not None and guidance <= 1:
            raise RecipeError(
                f"has no effect at guidance {guidance:g}", where=name, hint="add --guidance 3, or remove it"
            )


def _refuse_unguided(steps: int, no_cfg_until: int, start: float, stop: float) -> None:
    """Raises RecipeError if no step is left to guide: guidance and negative prompt would do nothing."""
    from libreflux.sample.settings import guided_steps

    if no_cfg_until >= steps:
        hint = f"use at most {steps - 1}, or --guidance 1 instead" if steps > 1 else "remove it, or use more --steps"
        raise RecipeError(f"leaves no step of {steps} guided", where="--no-cfg-until", hint=hint)
    guided_steps(steps, no_cfg_until, start, stop)


def picture_targets(out: Path, prompts: list[str], wanted: list[tuple[str, int]]) -> list[Path]:
    """Where each picture goes: the one file, or numbered names in a folder; the place is tried.

    Raises:
        RecipeError: several pictures for one file, a file that is no PNG, or a file where a folder is needed.
        RunError: nothing can be written there.
    """
    targets = _named_targets(out, prompts, wanted)
    file_place(targets[0])
    for target in targets[1:]:
        if target.is_dir():
            raise RunError("is a folder", where=target, hint="name another place with --out")
    return targets


def _named_targets(out: Path, prompts: list[str], wanted: list[tuple[str, int]]) -> list[Path]:
    above = next((folder for folder in out.absolute().parents if os.path.lexists(folder)), Path("/"))
    if not above.is_dir():
        raise RecipeError("is a file, not a folder", where=above, hint="name another place with --out")
    if out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise RecipeError(f"{out.suffix} is not written", where=out, hint="name a .png file or a folder")
        if len(wanted) > 1:
            raise RecipeError(f"{len(wanted)} pictures do not fit one file", where=out, hint="name a folder")
        return [out]
    if out.exists() and not out.is_dir():
        raise RecipeError("is a file, not a folder", where=out, hint="name a .png file or a folder")
    count = len(wanted) // len(prompts)
    return [
        out / f"{index // count + 1:03d}-{_slug(prompt)}-seed{seed}.png" for index, (prompt, seed) in enumerate(wanted)
    ]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
