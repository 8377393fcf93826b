"""`libreflux grid PROMPT…`: the same noise by models, steps and guidance scales, as a sheet and a page."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from libreflux.cli.generate import check_picture
from libreflux.cli.models import Base, ComfyUI, chosen_model
from libreflux.cli.options import Offload, OffloadOption, QuantizeOption
from libreflux.errors import LibrefluxError, RecipeError
from libreflux.places import file_place, folder_place
from libreflux.printing import say

if TYPE_CHECKING:
    from libreflux.cli.drawing import Chosen, Opened
    from libreflux.model.single_file import SingleFiles
    from libreflux.sample.metadata import Origin

MOST = 10_000


@dataclass(frozen=True)
class Column:
    """What a column of the grid is drawn with; None is the model's own."""

    model: str
    steps: int | None
    guidance: float | None


def grid(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.", show_default=False)
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model: a name, a folder or a hub id; may be repeated; default: emoji-libre, or the adapter's."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="PATH[:WEIGHT]", help="Put on every model; may be repeated.")
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="1,3.5 or 1:6:1", help="Guidance scales; the last one of a range is in it.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="4,28", help="Numbers of sampling steps.")] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1 or 0:3", help="Seeds: a row for each, with one noise.")] = "0",
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    width: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels, a multiple of 16; default: the model's.")] = None,
    base: Base = None,
    comfyui: ComfyUI = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: QuantizeOption = None,
    offload: OffloadOption = Offload.auto,
    out: Annotated[Path, typer.Option(help="Folder of grid.png, index.html and the cells; continued.")] = Path(
        "out/grid"
    ),
) -> None:
    """Compare models, guidance scales and steps on the same noise. Cells that exist are not drawn again."""
    for name, size in (("--width", width), ("--height", height)):
        if size is not None and size % 16:
            raise RecipeError(f"{size} is not a multiple of 16", where=name, mend=f"use {round(size / 16) * 16}")
    folder_place(out, "cells")
    for name in ("grid.png", "index.html"):
        file_place(out / name)
    scales = [None] if guidance is None else numbers("--guidance", guidance)
    counts = [None] if steps is None else [int(n) for n in numbers("--steps", steps, whole=True, least=1)]
    for count in counts:
        check_picture(width, height, count)
    noises = [int(n) for n in numbers("--seeds", seeds, whole=True)]

    from libreflux.cli.drawing import device_for
    from libreflux.cli.grid_page import write
    from libreflux.files import lock

    sources = _sources(model or [], base, comfyui, adapter or [])
    columns = [Column(*each) for each in itertools.product(sources, counts, scales)]
    rows = list(itertools.product(prompts, noises))
    common = {"negative": negative, "width": width, "height": height}
    if quantize is not None:
        common["quantize"] = quantize.value
    device_for(device, offload, quantize)  # before there is a folder
    with lock(out):
        cells = _Cells(out, common, sources, adapter or [], device, offload, columns, rows)
        drawn = [[cells.cell(column, prompt, seed) for prompt, seed in rows] for column in columns]
        table = [list(row) for row in zip(*drawn, strict=True)]
        page = write(out, table, [f"{prompt}, seed {seed}" for prompt, seed in rows], len(sources) > 1)
    say(out / "grid.png", f"{page}, to be looked at; {cells.made} of {cells.total} cells were drawn now")


def _sources(
    models: list[str], base: str | None, comfyui: Path | None, adapters: list[str]
) -> dict[str, str | SingleFiles]:
    """Name -> model; `--base` and `--comfyui` are for the single files among them."""
    from libreflux.cli.adapters import default_model

    files = [model for model in models if model.lower().endswith(".safetensors")]
    if not models or (not files and (base or comfyui)):
        one = chosen_model(models[0] if models else None, base, comfyui) or default_model(adapters)
        return {str(one): one, **{model: model for model in models[1:]}}
    chosen = (chosen_model(model, *((base, comfyui) if model in files else (None, None))) for model in models)
    return {str(one): one for one in chosen if one is not None}


class _Cells:
    """Pictures by column, prompt and seed; a model is opened when its first missing one is asked for."""

    def __init__(
        self,
        out: Path,
        common: dict[str, str | int | None],
        sources: dict[str, str | SingleFiles],
        adapters: list[str],
        device: str,
        offload: Offload,
        columns: list[Column],
        rows: list[tuple[str, int]],
    ) -> None:
        self.out, self.common, self.adapters, self.device, self.offload = out, common, adapters, device, offload
        self.quantize: Literal["int8"] | None = "int8" if "quantize" in common else None
        self.sources = sources
        self.columns, self.rows, self.total = columns, rows, len(columns) * len(rows)
        self.made = self.done = 0
        self._opened: tuple[str, Chosen, Opened] | None = None
        self._weights: dict[str, list[object]] = {}

    def cell(self, column: Column, prompt: str, seed: int) -> tuple[Path, Origin]:
        from libreflux.sample.metadata import read_origin

        asked = [asdict(column), prompt, seed, self.common, self._identity(column.model)]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        path = self.out / "cells" / f"{digest[:24]}.png"
        self.done += 1
        try:
            return path, read_origin(path)
        except (LibrefluxError, OSError):
            return path, self._draw(column, prompt, seed, path)

    def _identity(self, model: str) -> list[object]:
        """Hashes of the weights and of the adapters, without loading any of them into memory."""
        if model not in self._weights:
            from libreflux.cli.adapters import load_arguments
            from libreflux.model.family import locate, weights_hash

            source = self.sources[model]
            place = locate(source) if isinstance(source, str) else source.transformer
            others = [] if isinstance(source, str) else [repr(source)]
            files = [[file.sha256, weight] for file, weight in load_arguments(self.adapters)]
            self._weights[model] = [weights_hash(place), files, *others]
        return self._weights[model]

    def _draw(self, column: Column, prompt: str, seed: int, path: Path) -> Origin:
        from libreflux.cli.progress import progress
        from libreflux.sample.metadata import save_png

        chosen, opened = self._open(column.model)
        origin = opened.stamped(self._wanted(chosen, column, prompt, seed))
        with progress("drawing", "step") as report:
            note = f"cell {self.done} of {self.total}"
            image = opened.draw(origin, lambda step: report(step.index + 1, origin.steps, note))
        save_png(image, path, origin)
        self.made += 1
        return origin

    def _open(self, model: str) -> tuple[Chosen, Opened]:
        """The model, ready for every cell of its columns: their texts are encoded together, before it is loaded."""
        from libreflux.cli.drawing import open_for_drawing

        if self._opened is None or self._opened[0] != model:
            self._opened = None  # before the next one needs the memory
            chosen = open_for_drawing(self.sources[model], self.adapters, self.device, self.offload, self.quantize)
            columns = [column for column in self.columns if column.model == model]
            wanted = [self._wanted(chosen, column, *row) for column in columns for row in self.rows]
            self._opened = model, chosen, chosen.load(wanted)
        return self._opened[1:]

    def _wanted(self, chosen: Chosen, column: Column, prompt: str, seed: int) -> Origin:
        from libreflux.sample.metadata import Origin

        facts, size = chosen.facts, chosen.size
        width, height = (int(self.common[name] or size) for name in ("width", "height"))
        check_picture(width, height, column.steps)
        own = 1.0 if facts.guidance_embeds else facts.guidance
        scale = own if column.guidance is None else column.guidance
        return Origin(
            prompt=prompt, seed=seed, negative=str(self.common["negative"]) if scale > 1 else "",
            steps=column.steps or facts.steps, guidance=scale, width=width,
            height=height, model=column.model,
            embedded_guidance=facts.guidance if facts.guidance_embeds else None, quantize=chosen.quantize,
        )  # fmt: skip


def numbers(where: str, text: str, *, whole: bool = False, least: float = 0.0) -> list[float]:
    """Distinct numbers from "1,3.5" and ranges "FIRST:LAST" or "FIRST:LAST:STEP", LAST included.

    Raises:
        RecipeError: no such list.
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            first, *rest = (float(each) for each in part.split(":"))
            last, step = rest[0] if rest else first, rest[1] if len(rest) > 1 else 1.0
            count = math.floor((last - first) / step + 1e-9) + 1
            if len(rest) > 2 or step <= 0 or not 1 <= count <= MOST:
                raise ValueError
        except (ValueError, OverflowError, ZeroDivisionError):
            mend = "write 1,3.5 or 1:6:1"
            raise RecipeError(f"{part!r} is no number or range", where=where, mend=mend) from None
        found += [round(first + index * step, 9) for index in range(count)]
    for value in found:
        if not (math.isfinite(value) and least <= value and (not whole or value.is_integer())):
            raise RecipeError(
                f"cannot be {value:g}", where=where, mend=f"use {'whole ' if whole else ''}numbers from {least:g}"
            )
    return list(dict.fromkeys(found))
