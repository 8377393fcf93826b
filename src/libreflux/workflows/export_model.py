"""A model in int8, or as diffusers or ComfyUI read it, with what one needs to draw with it there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from libreflux.model.latents import own_side
from libreflux.model.opening import open_model
from libreflux.model.quantise import quantise_folder
from libreflux.model.save import LiveParts, save_model
from libreflux.model.single_file import SingleFiles
from libreflux.model.single_save import save_files, save_transformer, transformer_file
from libreflux.model.source import ModelSource
from libreflux.sample.export_script import comfyui_workflow, diffusers_scheduler, diffusers_script
from libreflux.workflows.model_card import model_card

PROMPT = "a red apple on blue"
"""Of the examples that are written beside a model."""


def export_model(model: str | SingleFiles, program: str | None, out: Path) -> None:
    """Writes a model.

    Args:
        model: as `open_model` takes it.
        program: "diffusers" or "bfl"; None is int8, for libreflux.
        out: a folder, or with "bfl" a .safetensors file, which gets the transformer alone.

    Raises:
        ModelError: no such model, a damaged one, or one that the program cannot have.
    """
    if program is None:
        quantise_folder(model, out)
        return
    source = open_model(model)
    transformer = source.load_transformer(quantise=False)
    if program == "bfl" and out.suffix == ".safetensors":
        save_transformer(transformer, source.facts, out)
    elif program == "bfl":
        vae, text = source.load_vae(), source.load_text()
        save_files(out, source.name, source.facts, transformer, vae, text, extras=_for_comfyui(source))
    else:
        live = LiveParts(transformer=transformer, scheduler=diffusers_scheduler(source.facts, source.scheduler))
        if not isinstance(model, str):  # of a folder the other parts are copied
            live = dataclasses.replace(live, vae=source.load_vae(), text=source.load_text())
        dtype = str(transformer.dtype).removeprefix("torch.")
        save_model(out, source.facts, live, source, extras=_for_diffusers(source, dtype))


def _for_diffusers(source: ModelSource, dtype: str) -> dict[str, str]:
    script = diffusers_script(source.facts, size=_own_side(source), dtype=dtype)
    card = model_card(source.facts, Path(source.name).stem, f'python draw.py "{PROMPT}"' if script else None)
    return {"README.md": card} | ({"draw.py": script} if script else {})


def _for_comfyui(source: ModelSource) -> dict[str, str]:
    workflow = comfyui_workflow(
        source.facts,
        transformer=transformer_file(source.name),
        size=_own_side(source),
        prompt=PROMPT,
    )
    return {"workflow.json": json.dumps(workflow, indent=2) + "\n"}


def _own_side(source: ModelSource) -> int:
    return own_side(source.part_config("vae"), f"{source.path}, VAE")
