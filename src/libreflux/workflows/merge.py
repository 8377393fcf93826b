"""A model and adapters made into a new model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.errors import AdapterError, OptionError
from libreflux.places import new_place
from libreflux.printing import WITH_OPTIONS, get_logger
from libreflux.workflows.adapters import adapted_facts, check_base, load_arguments
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.model_options import chosen_model
from libreflux.workflows.progress import Progress, silent

if TYPE_CHECKING:
    from libreflux.adapter.io import AdapterFile
    from libreflux.adapter.rounding import Kept, Rounding
    from libreflux.model.source import ModelSource

logger = get_logger(__name__)

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What may be asked for besides int8, as torch calls it."""
NOT_SAID = ("key_map", "schema", "format", "base_lineage")
"""Of an adapter's metadata: what a lineage does not repeat."""
KEPT, ADDED = 0.9, 1.0
"""A rounding that keeps less of the change, or adds more than it, is warned of."""


@dataclass(frozen=True)
class MergeOptions:
    """What is merged.

    Attributes:
        model: to start from: a name, a folder, a hub id or a single .safetensors file.
        adapters: adapter files or run folders, each as "PATH" or "PATH:WEIGHT".
        out: folder of the new model; it must not exist yet.
        dtype: what the sum is rounded to: "int8", "bf16", "fp16" or "fp32"; None is the model's own, and of an int8
            model what its other weights have.
        base: model that has what a single file lacks.
        comfyui: folder with the other parts of a single file, such as ComfyUI's models.
        progress: shows how far it is.
    """

    model: str
    adapters: str | Path | Sequence[str | Path]
    _: KW_ONLY
    out: Path | str
    dtype: str | None = None
    base: str | None = None
    comfyui: Path | str | None = None
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True)
class MergeResult:
    """What was made.

    Attributes:
        out: folder of the new model.
        changed: names of the layers that differ from the model's, in its order.
        dtype: what the sum was rounded to: "int8", or "bf16" and its kin.
        roundings: what that leaves of the change, for each changed layer.
    """

    out: Path
    changed: tuple[str, ...]
    dtype: str
    roundings: tuple[Rounding, ...]

    @property
    def change(self) -> float:
        """||dW|| / ||W|| of all changed layers together."""
        norm, change = (sum(getattr(row, key) ** 2 for row in self.roundings) for key in ("norm", "change"))
        return float((change / norm) ** 0.5) if norm else 0.0

    @property
    def stored(self) -> Kept:
        """What is left of the change, as it is stored."""
        from libreflux.adapter.rounding import together

        return together((row, row.stored) for row in self.roundings)

    @property
    def in_int8(self) -> Kept:
        """What is left of the change for an int8 model of this one, such as `base: int8` of a recipe makes."""
        from libreflux.adapter.rounding import together

        return together((row, row.int8) for row in self.roundings)


def merge_with(options: MergeOptions) -> MergeResult:
    """Adds adapters to a model's weights, in fp32, rounded once, and saves a new model.

    Its facts are the model's under the adapters, and its lineage names all of them. Memory holds the adapters and one
    layer of the model.

    Raises:
        OptionError: an option that has no effect, or a dtype that is none.
        RunError: `out` exists, or cannot be written.
        LibrefluxError: a model or an adapter that cannot be read, do not go together, or add up to no finite numbers.

    Example::

        import libreflux

        made = libreflux.merge("emoji-schnell", adapters=["runs/mine:0.8"], out="models/mine")
        print(len(made.changed), "layers changed;", made.stored.share, "of the change is kept")
        libreflux.LibreFluxPipeline.from_pretrained(made.out)("a red apple on blue").images[0].save("apple.png")
    """
    if options.dtype not in (None, "int8", *DTYPES):
        raise OptionError(f"cannot be {options.dtype!r}", "dtype", hint=f"use int8, {', '.join(DTYPES)}")
    out = Path(options.out)
    new_place(out)

    import torch

    from libreflux.adapter.merge import MergedTensors
    from libreflux.model.opening import open_model
    from libreflux.model.save import LiveParts, save_model
    from libreflux.model.streamed import StreamedTransformer
    from libreflux.model.weight_reader import weight_reader

    files = load_arguments(options.adapters)
    if not files:
        raise AdapterError("no adapter to merge", hint="name at least one adapter file")
    comfyui = None if options.comfyui is None else Path(options.comfyui)
    source = chosen_model(options.model, options.base, comfyui) or options.model
    start = open_model(source)
    before = weight_reader(start)
    check_base(start, start.hash, files)
    int8 = options.dtype == "int8"
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype in DTYPES else before.dtype
    if options.dtype is None and before.is_int8:
        logger.warning("%s is stored in int8: the new model is in %s", options.model, _told(dtype))
    facts = dataclasses.replace(adapted_facts(start.facts, files), lineage=_lineage(options.model, start, files))
    with options.progress("merging", "tensor") as report:
        merged = MergedTensors(before, files, dtype=dtype, int8=int8, on_tensor=report)
        live = LiveParts(transformer=StreamedTransformer(start.config, dtype, int8, merged))
        if not isinstance(source, str):  # of a folder the other parts are copied
            live = dataclasses.replace(live, vae=start.load_vae(), text=start.load_text())
        with before.verified():
            save_model(out, facts, live, start)
    made = MergeResult(out, merged.changed, "int8" if int8 else _told(dtype), tuple(merged.roundings))
    _warn(made)
    return made


def _told(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    return next((short for short, long in DTYPES.items() if long == name), name)


def _warn(made: MergeResult) -> None:
    """Says so where a good part of the change is lost as it is stored."""
    left, wider = made.stored, "`dtype` fp32" if made.dtype in ("bf16", "fp16") else "`dtype` bf16 or fp32"
    if left.share < KEPT or left.error > ADDED:
        logger.warning(
            "%s rounding loses %.0f %% of the change and adds an error of %.0f %% of it: %s keeps more",
            made.dtype,
            100 * max(0.0, 1 - left.share),
            100 * left.error,
            wider,
            extra=WITH_OPTIONS,
        )


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
    return {key: value for key, value in sorted(metadata.items()) if key not in NOT_SAID}


merge = by_keywords(MergeOptions, merge_with)
