"""`libreflux merge MODEL ADAPTER[:w]… --out DIR`: a new model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from libreflux.cli.options import Base, ComfyUI
from libreflux.places import new_place
from libreflux.printing import counted, get_logger, say
from libreflux.workflows.models import chosen_model

logger = get_logger(__name__)


def merge(
    model: Annotated[str, typer.Argument(help="Model to start from: name, folder or hub id.", show_default=False)],
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="Adapter files or run folders, and weights (1).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must not exist yet.", show_default=False)],
    base: Base = None,
    comfyui: ComfyUI = None,
) -> None:
    """Add adapters to a model's weights, in fp32, rounded once, and save a new model."""
    new_place(out)

    import torch

    from libreflux.adapter.merge import merge_many
    from libreflux.model.int8 import dequantise_model
    from libreflux.model.source import LiveParts, open_model, save_model
    from libreflux.workflows.adapters import adapted_facts, load_arguments, notice_other_base

    files = load_arguments(adapters)
    source = chosen_model(model, base, comfyui) or model
    start = open_model(source)
    transformer = start.load_transformer()
    notice_other_base(start.hash, files)
    dtype = transformer.dtype
    if was_int8 := dequantise_model(transformer, torch.float32):
        logger.warning("%s is stored in int8: the new model is in %s", model, str(dtype).removeprefix("torch."))
    changed = merge_many(transformer, files)
    for name in was_int8:
        transformer.get_submodule(name).to(dtype)
    lineage: dict[str, Any] = {
        "base": model,
        "base_sha256": start.hash,
        "adapters": [
            {
                "file": Path(file.where).name,
                "sha256": file.sha256,
                "weight": weight,
                **_origin(file.metadata),
            }
            for file, weight in files
        ],
    }
    if start.facts.lineage:
        lineage["base_lineage"] = start.facts.lineage
    facts = dataclasses.replace(adapted_facts(start.facts, files), lineage=lineage)
    live = LiveParts(transformer=transformer)
    if not isinstance(source, str):  # of a folder the other parts are copied
        live = dataclasses.replace(live, vae=start.load_vae(), text=start.load_text())
    save_model(out, facts, live, start)
    say(f"{counted(len(changed), 'layer')} changed, saved in {out}")


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    """What an adapter file says of its own making, without the key map."""
    return {key: value for key, value in sorted(metadata.items()) if key not in ("key_map", "schema", "format")}
