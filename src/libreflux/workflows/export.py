"""A model or an adapter in another form, for ourselves or for other programs."""

from __future__ import annotations

import os
import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.adapter.checks import notice_training_adapter, refuse_training_adapter
from libreflux.errors import OptionError
from libreflux.places import new_place
from libreflux.workflows.adapters import load_adapter
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.model_options import chosen_model
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent

MODEL_PROGRAMS = ("diffusers", "bfl")
ADAPTER_PROGRAMS = ("comfyui", "diffusers", "kohya", "lycoris")
_OF_AN_ADAPTER = re.compile(r"\.(lora|lokr|hada|oft|boft|glora|ia3)_|\.(diff|diff_b|alpha|dora_scale)$")
"""What no model's tensors are called: LoRA, LoKr and their kin, and the plain differences that ComfyUI saves."""


@dataclass(frozen=True)
class ExportOptions:
    """What is written, and for whom. One of `int8` and `program` is needed.

    Attributes:
        what: a model, or an adapter file or run folder; None is the model in `comfyui`.
        out: folder of the new model, or .safetensors file; it must not exist yet.
        int8: a model with its transformer in int8, for libreflux.
        program: "diffusers" or "bfl" for a model; "comfyui", "diffusers", "kohya" or "lycoris" for an adapter.
        rank: of the LoRA that every LoKr of an adapter becomes, for programs that read none; None keeps LoKr.
        base: model that has what a single file lacks.
        comfyui: folder with the parts of a model, such as ComfyUI's models.
        progress: shows how far it is.
    """

    what: str | None = None
    _: KW_ONLY
    out: Path | str
    int8: bool = False
    program: str | None = None
    rank: int | None = None
    base: str | None = None
    comfyui: Path | str | None = None
    progress: Progress = field(default=silent, repr=False, compare=False)


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        out: the folder or file.
        size: bytes of all its files.
        lost: of an adapter: norm of what the new form lacks, relative to the norm of the adapter's change; 0 is exact.
        unread: of an adapter: layers in the file that the program does not read.
        ranks: of an adapter: of the LoRAs in it, from the lowest.
    """

    out: Path
    size: int
    lost: float = 0.0
    unread: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()


def export_with(options: ExportOptions) -> ExportResult:
    """Writes a model in int8 (half the size), or a model or an adapter as other programs read it.

    Raises:
        OptionError: an option that is missing, has no effect, or names no program.
        RunError: `out` exists, or cannot be written.
        LibrefluxError: a model or an adapter that cannot be read, or a part of it that the program does not know.

    Example::

        import libreflux

        made = libreflux.export("emoji-libre", program="diffusers", out="emoji-diffusers")
        print(made.size / 1e6, "MB")
        libreflux.export("runs/mine", program="comfyui", out="mine.safetensors")
    """
    out = Path(options.out)
    adapter = options.what is not None and options.comfyui is None and is_adapter(options.what)
    _check(options, adapter)
    new_place(out)
    if adapter:
        return _export_adapter(options, out)

    comfyui = None if options.comfyui is None else Path(options.comfyui)
    model = chosen_model(options.what, options.base, comfyui)
    if model is None:
        raise OptionError("nothing to export", "what", hint="name a model or an adapter")

    from libreflux.workflows.export_model import export_model

    export_model(model, options.program, out)
    return ExportResult(out, _size(out))


def is_adapter(text: str | Path) -> bool:
    """Whether it is a run's folder, or a file with an adapter's tensors; what is neither is taken for a model."""
    path = Path(os.path.expanduser(text))
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


def _check(options: ExportOptions, adapter: bool) -> None:
    if options.int8 == (options.program is not None):
        hint = "write `int8` or `program` diffusers"
        raise OptionError("one of them is needed", "int8, program", hint=hint)
    programs = ADAPTER_PROGRAMS if adapter else MODEL_PROGRAMS
    if options.program is not None and options.program not in programs:
        kind = "an adapter" if adapter else "a model"
        hint = f"use {', '.join(programs)}"
        raise OptionError(f"no program {options.program!r} for {kind}", "program", hint=hint)
    if options.int8 and adapter:
        raise OptionError("has no effect on an adapter", "int8", hint="use `program`")
    if options.rank is not None and not adapter:
        raise OptionError("has no effect on a model", "rank", hint="remove it")
    if options.rank is not None:
        check_whole("rank", options.rank, 1)


def _export_adapter(options: ExportOptions, out: Path) -> ExportResult:
    if options.base is not None:
        raise OptionError("has no effect on an adapter", "base", hint="remove it")
    if out.suffix != ".safetensors":
        raise OptionError("is no .safetensors file", str(out), hint="name one with `out`")
    assert options.what is not None
    assert options.program is not None

    from libreflux.adapter.export import export_adapter

    with options.progress("exporting", "layer") as report:
        file = load_adapter(options.what)
        refuse_training_adapter(file)
        notice_training_adapter([file])
        done = export_adapter(file, options.program, out, rank=options.rank, on_layer=report)
    return ExportResult(out, _size(out), done.lost, done.unread, done.ranks)


def _size(out: Path) -> int:
    written = [file for file in out.rglob("*") if file.is_file()] if out.is_dir() else [out]
    return sum(file.stat().st_size for file in written)


export = by_keywords(ExportOptions, export_with)
