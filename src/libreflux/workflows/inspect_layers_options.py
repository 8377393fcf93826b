"""What may be said of an inspection of layers, and what is refused before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from libreflux.errors import OptionError, RunError
from libreflux.places import file_place, folder_place
from libreflux.values import check_side, listed_numbers
from libreflux.workflows.picture_options import check_whole
from libreflux.workflows.progress import Progress, silent

MEASURES = ("distance", "centred", "gradient", "change")
PRECISIONS = ("stored", "fp32", "bf16")
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
FILE, PAGE, TARGETS = "layers.json", "index.html", "adapter.yaml"
LAYERS = Path("out/layers")
_BEGUN = ("cache", "data")
"""What an inspection that was interrupted leaves."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = re.compile(r"\s*((?:\d{1,3}(?:[,_]\d{3})+|\d+)(?:\.\d*)?(?:e\d{1,2})?)\s*([kmb]?)\s*", re.IGNORECASE)
"""Commas stand between thousands alone: "3,2B" would be read as 32 B by one and as 3.2 B by another."""


@dataclass(frozen=True)
class InspectLayersOptions:
    """What is looked into, and what is made of it.

    Attributes:
        model: a name, a folder, a hub id or a single .safetensors file.
        adapters: adapter files or run folders that are put on it, each as "PATH" or "PATH:WEIGHT".
        against: another model, or an adapter as "PATH" or "PATH:WEIGHT": what changed to it, layer by layer, from the
            model without `adapters`.
        data: folder of captioned pictures; None is the emoji family's.
        out: folder of the result; None is out/layers/NAME.
        pictures: at most so many.
        sigmas: noise levels in (0, 1), at most five.
        budget: parameters of an adapter, a number or a text as "600M", "3.2B" or "40k"; None: no targets are written.
        measure: what says where the budget goes: "distance", "centred", "gradient" or "change"; None is "change" with
            `against`, else "distance".
        resolution: side of the pictures in pixels; None is the model's, at most 512.
        seed: of the noise.
        dtype: of the weights: "stored", "fp32" or "bf16".
        quantize: "int8": the transformer is quantised while it is read; None: as stored.
        base: model that has what a single file lacks.
        comfyui: folder with the other parts of a single file, such as ComfyUI's models.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        progress: shows how far it is.
    """

    model: str
    _: KW_ONLY
    adapters: str | Path | Sequence[str | Path] = ()
    against: str | None = None
    data: Path | str | None = None
    out: Path | str | None = None
    pictures: int = 16
    sigmas: Sequence[float] = SIGMAS
    budget: int | float | str | None = None
    measure: str | None = None
    resolution: int | None = None
    seed: int = 0
    dtype: str = "stored"
    quantize: str | None = None
    base: str | None = None
    comfyui: Path | str | None = None
    device: str = "auto"
    progress: Progress = field(default=silent, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", listed_numbers(self.sigmas, "sigmas"))


def measure_of(options: InspectLayersOptions) -> str:
    """What says where a budget goes."""
    return options.measure or ("change" if options.against is not None else "distance")


def out_of(options: InspectLayersOptions, name: str) -> Path:
    """The folder of the result; one that is named by model and adapters is tried as well."""
    if options.out is not None:
        return Path(options.out)
    out = LAYERS / name
    try_out(out)
    return out


def check_options(options: InspectLayersOptions) -> int | None:
    """Refuses what can be refused without a model; gives the budget as a number.

    Raises:
        OptionError: an option that has no effect, or a value that is none.
    """
    check_whole("pictures", options.pictures, 1)
    check_whole("seed", options.seed, 0)
    if options.resolution is not None:
        check_whole("resolution", options.resolution, 16, 8192)
        check_side(options.resolution, "resolution")
    if not 1 <= len(options.sigmas) <= 5 or len(set(options.sigmas)) < len(options.sigmas):
        raise OptionError("needs one to five different noise levels", "sigmas", hint="write 0.1,0.5,0.9")
    for sigma in options.sigmas:
        if not isinstance(sigma, int | float) or not 0 < sigma < 1:
            raise OptionError(f"cannot be {sigma!r}", "sigmas", hint="use numbers between 0 and 1")
    for name, value, known in (("dtype", options.dtype, PRECISIONS), ("quantize", options.quantize, (None, "int8"))):
        if value not in known:
            raise OptionError(f"cannot be {value!r}", name, hint=f"use {' or '.join(filter(None, known))}")
    if options.measure is not None and options.measure not in MEASURES:
        raise OptionError(f"no measure {options.measure!r}", "measure", hint=f"use {', '.join(MEASURES)}")
    if options.measure is not None and options.budget is None:
        raise OptionError("has no effect without `budget`", "measure", hint="give a number of parameters with `budget`")
    if options.measure == "change" and options.against is None:
        raise OptionError("change needs a second model", "measure", hint="name a model or an adapter with `against`")
    return None if options.budget is None else parameters_of(options.budget)


def parameters_of(text: int | float | str) -> int:
    """A number of parameters: 600000000, "600M", "3.2B" or "40k".

    Raises:
        OptionError: none of these.
    """
    found = _NUMBER.fullmatch(str(text))
    value = math.nan if found is None else float(re.sub("[,_]", "", found[1])) * _UNITS[found[2].lower()]
    if not (math.isfinite(value) and value >= 1):
        raise OptionError(f"{text!r} is no number of parameters", "budget", hint="write 600M, 3.2B or 40k")
    return round(value)


def try_out(out: Path) -> None:
    """Raises RunError unless the folder is free, or of this verb, whole or not, and can be written."""
    folder_place(out, "cache")
    for name in (FILE, PAGE, TARGETS):
        file_place(out / name)
    if not out.is_dir() or (out / FILE).is_file():
        return
    if any(path.name not in _BEGUN and not path.name.startswith(".") for path in out.iterdir()):
        raise RunError("holds something else", where=out, hint="name another folder, or an empty one")
