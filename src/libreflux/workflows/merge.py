"""A model and adapters made into a new model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.errors import AdapterError
from libreflux.places import new_place
from libreflux.printing import get_logger
from libreflux.workflows.adapters import adapted_facts, load_arguments, notice_other_base
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.model_options import chosen_model

if TYPE_CHECKING:
    from libreflux.adapter.io import AdapterFile
    from libreflux.model.source import ModelSource

logger = get_logger(__name__)


@dataclass(frozen=True)
class MergeOptions:
    """What is merged.

    Attributes:
        model: to start from: a name, a folder, a hub id or a single .safetensors file.
        adapters: adapter files or run folders, each as "PATH" or "PATH:WEIGHT".
        out: folder of the new model; it must not exist yet.
        base: model that has what a single file lacks.
        comfyui: folder with the other parts of a single file, such as ComfyUI's models.
    """

    model: str
    adapters: str | Path | Sequence[str | Path]
    _: KW_ONLY
    out: Path | str
    base: str | None = None
    comfyui: Path | str | None = None


@dataclass(frozen=True)
class MergeResult:
    """What was made.

    Attributes:
        out: folder of the new model.
        changed: names of the layers that differ from the model's, in its order.
    """

    out: Path
    changed: tuple[str, ...]


def merge_with(options: MergeOptions) -> MergeResult:
    """Adds adapters to a model's weights, in fp32, rounded once, and saves a new model.

    Its facts are the model's under the adapters, and its lineage names all of them.

    Raises:
        OptionError: an option that has no effect.
        RunError: `out` exists, or cannot be written.
        LibrefluxError: a model or an adapter that cannot be read, do not go together, or add up to no finite numbers.

    Example::

        import libreflux

        made = libreflux.merge("emoji-schnell", adapters=["runs/mine:0.8"], out="models/mine")
        print(len(made.changed), "layers changed")
        libreflux.LibreFluxPipeline.from_pretrained(made.out)("a red apple on blue").images[0].save("apple.png")
    """
    out = Path(options.out)
    new_place(out)

    import torch

    from libreflux.adapter.merge import merge_many
    from libreflux.model.int8 import dequantise_model
    from libreflux.model.opening import open_model
    from libreflux.model.save import LiveParts, save_model

    files = load_arguments(options.adapters)
    if not files:
        raise AdapterError("no adapter to merge", hint="name at least one adapter file")
    comfyui = None if options.comfyui is None else Path(options.comfyui)
    source = chosen_model(options.model, options.base, comfyui) or options.model
    start = open_model(source)
    transformer = start.load_transformer()
    notice_other_base(start.hash, files)
    dtype = transformer.dtype
    if was_int8 := dequantise_model(transformer, torch.float32):
        stored = str(dtype).removeprefix("torch.")
        logger.warning("%s is stored in int8: the new model is in %s", options.model, stored)
    changed = merge_many(transformer, files)
    for name in was_int8:
        transformer.get_submodule(name).to(dtype)
    lineage = _lineage(options.model, start, files)
    facts = dataclasses.replace(adapted_facts(start.facts, files), lineage=lineage)
    live = LiveParts(transformer=transformer)
    if not isinstance(source, str):  # of a folder the other parts are copied
        live = dataclasses.replace(live, vae=start.load_vae(), text=start.load_text())
    save_model(out, facts, live, start)
    return MergeResult(out, tuple(changed))


def _lineage(model: str, start: ModelSource, files: Sequence[tuple[AdapterFile, float]]) -> dict[str, Any]:
    """What the new model says of where it comes from."""
    adapters = [
        {"file": Path(file.where).name, "sha256": file.sha256, "weight": weight, **_said(file.metadata)}
        for file, weight in files
    ]
    lineage: dict[str, Any] = {"base": model, "base_sha256": start.hash, "adapters": adapters}
    return lineage | ({"base_lineage": start.facts.lineage} if start.facts.lineage else {})


def _said(metadata: dict[str, str]) -> dict[str, str]:
    """What an adapter file says of its own making, without the key map."""
    return {key: value for key, value in sorted(metadata.items()) if key not in ("key_map", "schema", "format")}


merge = by_keywords(MergeOptions, merge_with)
