"""The same noise by models, steps and guidance scales, as a labelled sheet and a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libreflux.errors import OptionError
from libreflux.model.compile_choice import Compile
from libreflux.places import file_place, folder_place
from libreflux.values import MOST_NUMBERS, listed_numbers
from libreflux.workflows.guidance_options import (
    GuidanceOptions,
    check_first_steps,
    check_nag,
    check_rule,
    check_zero_init,
    first_model,
)
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.picture_options import (
    Offload,
    OffloadBlocks,
    Quantize,
    adapter_texts,
    check_memory,
    check_picture,
    check_prompts,
    check_sides,
    check_whole,
    listed,
    named_model,
    refuse_unused,
)
from libreflux.workflows.progress import Progress, silent

if TYPE_CHECKING:
    from libreflux.model.single_file import SingleFiles
    from libreflux.workflows.grid_cells import Cell

SHEET, PAGE = "grid.png", "index.html"


@dataclass(frozen=True)
class GridOptions(GuidanceOptions):
    """What is compared: a row for each prompt and seed, a column for each model, number of steps and guidance scale.

    Attributes:
        prompts: what to draw: one prompt, or several.
        model: one model or several, see `GenerateOptions`; None: what the first adapter is for, or emoji-libre.
        base, comfyui: see `GenerateOptions`; for the single files among the models.
        adapters: put on every model, see `GenerateOptions`.
        guidance: guidance scales; None is each model's own.
        steps: numbers of sampling steps; None is each model's own.
        seeds: a row for each, with one noise.
        negative: negative prompt.
        width, height: pixels, multiples of 16; None is the model's own size.
        device, quantize, offload, offload_blocks, compile, on_notice: see `GenerateOptions`.
        out: folder of grid.png, index.html and the cells; continued.
        progress: shows the steps of the cells that are missing, see `workflows.progress`.
    """

    prompts: str | Sequence[str]
    _: KW_ONLY
    model: str | Path | Sequence[str | Path] | None = None
    base: str | None = None
    comfyui: str | Path | None = None
    adapters: str | Path | Sequence[str | Path] = ()
    guidance: Sequence[float] | None = None
    steps: Sequence[int] | None = None
    seeds: Sequence[int] = (0,)
    negative: str = ""
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    quantize: Quantize | None = None
    offload: Offload = "auto"
    offload_blocks: OffloadBlocks = 0
    compile: Compile = "auto"
    out: str | Path = "out/grid"
    progress: Progress = field(default=silent, repr=False, compare=False)
    on_notice: Callable[[str], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("guidance", "steps", "seeds"):
            object.__setattr__(self, name, listed_numbers(getattr(self, name), name, whole=name != "guidance"))


@dataclass(frozen=True)
class GridResult:
    """What was drawn, and where it is.

    Attributes:
        sheet: the labelled sheet, a PNG.
        page: the page whose arrow keys flip through the columns.
        cells: rows of pictures, each with its file and its record.
        drawn: how many of them were drawn now; the others were there.
    """

    sheet: Path
    page: Path
    cells: tuple[tuple[Cell, ...], ...]
    drawn: int

    @property
    def total(self) -> int:
        """How many cells the grid has."""
        return sum(len(row) for row in self.cells)


def grid_with(options: GridOptions) -> GridResult:
    """Compare models, guidance scales and steps on the same noise. Cells that exist are not drawn again.

    Raises:
        OptionError: a value out of range, or an option that has no effect; before there is a folder.
        RunError: a place that cannot be written, or that another grid is writing; a device that is not there.
        ModelError, AdapterError: see `generate_with`.

    Example::

        import libreflux

        result = libreflux.grid("a fox on yellow", guidance=[1, 3], steps=[2, 4], seeds=[0, 1], out="grid")
        print(result.page, result.drawn, result.cells[0][0].record.parameters())
    """
    prompts, models, adapters, out = _checked(options)

    from libreflux.files import lock
    from libreflux.model.opening import open_model
    from libreflux.workflows.adapters import load_arguments
    from libreflux.workflows.drawing_device import device_for
    from libreflux.workflows.grid_cells import CellOptions, Cells, Column, Row
    from libreflux.workflows.grid_page import write

    sources = _sources(models, options, adapters)
    steps = [None] if options.steps is None else [int(one) for one in options.steps]
    scales = [None] if options.guidance is None else [float(one) for one in options.guidance]
    columns = [Column(*each) for each in itertools.product(sources, steps, scales)]
    rows = [Row(*each) for each in itertools.product(prompts, options.seeds)]
    # This and what follows: before there is a folder.
    device_for(options.device, options.offload, options.quantize, options.offload_blocks, options.compile)
    load_arguments(adapters)
    shared = CellOptions(
        {name: open_model(source) for name, source in sources.items()},
        adapters,
        negative=options.negative,
        width=options.width,
        height=options.height,
        device=options.device,
        quantize=options.quantize,
        offload=options.offload,
        offload_blocks=options.offload_blocks,
        compile=options.compile,
        on_notice=options.on_notice,
        guiding=options,
        first=None if (first := first_model(options)) is None else open_model(first),
    )
    with lock(out):
        cells = Cells(out, shared, columns, rows)
        table = list(zip(*cells.drawn(options.progress), strict=True))
        write(out / SHEET, out / PAGE, table, [row.label for row in rows], len(sources) > 1)
    return GridResult(out / SHEET, out / PAGE, tuple(table), cells.made)


def _checked(options: GridOptions) -> tuple[tuple[str, ...], list[str], tuple[str, ...], Path]:
    """Prompts, models, adapters and the folder, once everything that can be is refused; places are tried."""
    from libreflux.sample.checks import check_values

    prompts = listed(options.prompts)
    check_prompts(prompts, options.negative)
    check_sides(options.width, options.height)
    out = Path(options.out)
    folder_place(out, "cells")
    for name in (SHEET, PAGE):
        file_place(out / name)
    check_memory(options.offload, options.quantize, options.compile, options.offload_blocks)
    check_rule(options)
    check_nag(options, options.compile)
    check_picture(options.width, options.height, None)
    names = {"guidance_scale": "guidance"}
    _check_each("guidance", options.guidance, lambda scale: check_values({"guidance_scale": scale}, names))
    _check_each("steps", options.steps, lambda steps: check_picture(None, None, steps))
    check_first_steps(options, None)
    for steps in options.steps or ():
        check_zero_init(options, int(steps))
        check_first_steps(options, int(steps))
    if options.guidance_rule != "cfg":
        for scale in options.guidance or ():
            refuse_unused(scale, {"guidance_rule": True})
    _check_each("seeds", options.seeds, lambda seed: check_whole("seeds", seed, 0))
    given = options.model
    models = [] if given is None else [given] if isinstance(given, str | Path) else list(given)
    return prompts, [str(model) for model in models], adapter_texts(options.adapters), out


def _check_each(name: str, values: Sequence[Any] | None, check: Callable[[Any], None]) -> None:
    """Raises OptionError for no list, an empty or too long one, a wrong value in it, or one that is there twice."""
    if values is None and name != "seeds":
        return
    if not isinstance(values, Sequence) or isinstance(values, str) or not 1 <= len(values) <= MOST_NUMBERS:
        raise OptionError(f"cannot be {values!r}", name, hint=f"give a list of 1 to {MOST_NUMBERS} numbers")
    seen = set[float]()
    for value in values:
        if value is None:
            raise OptionError("cannot be None", name, hint="give numbers")
        check(value)
        if float(value) in seen:
            raise OptionError(f"has {value:g} twice", name, hint="remove one of them")
        seen.add(float(value))


def _sources(models: list[str], options: GridOptions, adapters: Sequence[str]) -> Mapping[str, str | SingleFiles]:
    """Name -> model; `base` and `comfyui` are for the single files among them."""
    from libreflux.workflows.adapters import default_model

    base, comfyui = options.base, options.comfyui
    files = [model for model in models if model.lower().endswith(".safetensors")]
    if not models or (not files and (base or comfyui)):
        one = named_model(models[0] if models else None, base, comfyui) or default_model(adapters)
        return {str(one): one, **{model: model for model in models[1:]}}
    chosen = (named_model(model, *((base, comfyui) if model in files else (None, None))) for model in models)
    return {str(one): one for one in chosen if one is not None}


grid = by_keywords(GridOptions, grid_with)
