"""`libreflux export WHAT --out PATH`: a model or an adapter in another form, for ourselves or for other programs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libreflux.cli.model_card import model_card
from libreflux.cli.options import Base, ComfyUI
from libreflux.errors import RecipeError
from libreflux.places import new_place
from libreflux.printing import say
from libreflux.workflows.models import chosen_model

if TYPE_CHECKING:
    from libreflux.model.single_file import SingleFiles
    from libreflux.model.source import ModelSource

MODEL_PROGRAMS = ("diffusers", "bfl")
ADAPTER_PROGRAMS = ("comfyui", "diffusers", "kohya", "lycoris")
_OF_AN_ADAPTER = re.compile(r"\.(lora|lokr|hada|oft|boft|glora|ia3)_|\.(diff|diff_b|alpha|dora_scale)$")
"""What no model's tensors are called: LoRA, LoKr and their kin, and the plain differences that ComfyUI saves."""


def export(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|ADAPTER]", help="A model, or an adapter file or run folder.", show_default=False
        ),
    ] = None,
    *,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the new model, or .safetensors file; it must not exist yet.", show_default=False),
    ],
    int8: Annotated[bool, typer.Option("--int8", help="A model with its transformer in int8, for libreflux.")] = False,
    program: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="PROGRAM", help="Of a model: diffusers or bfl; of an adapter: comfyui, diffusers, kohya or"
            " lycoris.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the LoRA that every LoKr becomes, for programs that read none.")
    ] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
) -> None:  # fmt: skip
    """Write a model in int8 (half the size), or a model or an adapter as other programs read it."""
    if int8 == (program is not None):
        raise RecipeError("one of them is needed", where="--int8, --for", hint="write --int8 or --for diffusers")
    adapter = what is not None and comfyui is None and _is_adapter(what)
    programs = ADAPTER_PROGRAMS if adapter else MODEL_PROGRAMS
    if program is not None and program not in programs:
        kind = "an adapter" if adapter else "a model"
        hint = f"use {', '.join(programs)}"
        raise RecipeError(f"no program {program!r} for {kind}", where="--for", hint=hint)
    if int8 and adapter:
        raise RecipeError("has no effect on an adapter", where="--int8", hint="use --for")
    if rank is not None and not adapter:
        raise RecipeError("has no effect on a model", where="--rank", hint="remove it")
    new_place(out)
    if adapter:
        assert what is not None and program is not None
        if base is not None:
            raise RecipeError("has no effect on an adapter", where="--base", hint="remove it")
        _export_adapter(what, program, out, rank)
    else:
        model = chosen_model(what, base, comfyui)
        if model is None:
            raise RecipeError("nothing to export", where="MODEL", hint="name a model or an adapter")
        _export_model(model, program, out)
    written = [file for file in out.rglob("*") if file.is_file()] if out.is_dir() else [out]
    say(f"{out}, {sum(file.stat().st_size for file in written) / 1e6:,.1f} MB")


def _is_adapter(text: str) -> bool:
    """Whether it is a run's folder, or a file with an adapter's tensors; what is neither is taken for a model."""
    path = Path(text).expanduser()
    if path.is_dir():
        from libreflux.adapter.peft import FILES

        return any((path / name).exists() for name in ("adapter.safetensors", "checkpoints", *FILES))
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return any(_OF_AN_ADAPTER.search(name) for name in file.keys())  # noqa: SIM118
    except SafetensorError:
        return False  # whoever reads it says what is wrong


def _export_adapter(text: str, program: str, out: Path, rank: int | None) -> None:
    if out.suffix != ".safetensors":
        raise RecipeError("is no .safetensors file", where=out, hint="name one with --out")

    from libreflux.adapter.export import export_adapter
    from libreflux.adapter.io import load_adapter
    from libreflux.cli.progress import progress
    from libreflux.workflows.adapters import adapter_file

    with progress("exporting", "layer") as report:
        file = load_adapter(adapter_file(Path(text).expanduser()))
        done = export_adapter(file, program, out, rank=rank, on_layer=report)
    if rank is not None:
        say(f"LoKr as LoRA of rank {rank}: {done.lost:.1%} of the adapter is lost (Frobenius norm)")
    if done.unread:
        more = f" and {len(done.unread) - 1} more" if len(done.unread) > 1 else ""
        say(f"sd-scripts does not read {done.unread[0]}{more}: that part of the change is lost there")
    if len(done.ranks) > 1:
        say(f"ranks {', '.join(map(str, done.ranks))}: OneTrainer reads a LoRA of one rank only")


def _export_model(name: str | SingleFiles, program: str | None, out: Path) -> None:
    from libreflux.model.quantise import quantise_folder
    from libreflux.model.single_save import save_files, save_transformer
    from libreflux.model.source import LiveParts, open_model, save_model

    if program is None:
        quantise_folder(name, out)
        return
    source = open_model(name)
    transformer = source.load_transformer(quantise=False)
    if program == "bfl" and out.suffix == ".safetensors":
        save_transformer(transformer, source.facts, out)
    elif program == "bfl":
        vae, text = source.load_vae(), source.load_text()
        save_files(out, source.name, source.facts, transformer, vae, text, extras=_for_comfyui(source))
    else:
        from libreflux.sample.export_script import diffusers_scheduler

        live = LiveParts(transformer=transformer, scheduler=diffusers_scheduler(source.facts, source.scheduler))
        if not isinstance(name, str):  # of a folder the other parts are copied
            live = dataclasses.replace(live, vae=source.load_vae(), text=source.load_text())
        dtype = str(transformer.dtype).removeprefix("torch.")
        save_model(out, source.facts, live, source, extras=_for_diffusers(source, dtype))


def _for_diffusers(source: ModelSource, dtype: str) -> dict[str, str]:
    from libreflux.sample.export_script import diffusers_script

    script = diffusers_script(source.facts, size=_own_side(source), dtype=dtype)
    draw = 'python draw.py "a red apple on blue"' if script else None
    card = model_card(source.facts, Path(source.name).stem, draw)
    return {"README.md": card} | ({"draw.py": script} if script else {})


def _for_comfyui(source: ModelSource) -> dict[str, str]:
    from libreflux.model.single_save import transformer_file
    from libreflux.sample.export_script import comfyui_workflow

    workflow = comfyui_workflow(
        source.facts,
        transformer=transformer_file(source.name),
        size=_own_side(source),
        prompt="a red apple on blue",
    )
    return {"workflow.json": json.dumps(workflow, indent=2) + "\n"}


def _own_side(source: ModelSource) -> int:
    from libreflux.model.latents import own_side

    return own_side(source.part_config("vae"), f"{source.path}, VAE")
