"""`libreflux grid PROMPT…`: the same noise by models, steps and guidance scales, as a sheet and a page."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from libreflux.cli.generate import check_picture
from libreflux.cli.options import Base, ComfyUI, Offload, OffloadOption, QuantizeOption
from libreflux.errors import LibrefluxError
from libreflux.places import file_place, folder_place
from libreflux.printing import counted, say
from libreflux.values import check_side, number_list
from libreflux.workflows.models import chosen_model

if TYPE_CHECKING:
    from libreflux.cli.drawing import Chosen, Opened
    from libreflux.cli.grid_page import Cell
    from libreflux.flow.solve import Step
    from libreflux.model.facts import Facts
    from libreflux.model.single_file import SingleFiles
    from libreflux.sample.metadata import GenerationRecord


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
    check_side(width, "--width")
    check_side(height, "--height")
    folder_place(out, "cells")
    for name in ("grid.png", "index.html"):
        file_place(out / name)
    scales = [None] if guidance is None else list(number_list(guidance, "--guidance"))
    counts = [None] if steps is None else [int(n) for n in number_list(steps, "--steps", whole=True, least=1)]
    for count in counts:
        check_picture(width, height, count)
    noises = [int(n) for n in number_list(seeds, "--seeds", whole=True)]

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
        drawn = cells.drawn()
        table = [list(row) for row in zip(*drawn, strict=True)]
        page = write(out, table, [f"{prompt}, seed {seed}" for prompt, seed in rows], len(sources) > 1)
    say(out / "grid.png", f"{page}, to be looked at; {cells.made:,} of {counted(cells.total, 'cell')} drawn now")


def _sources(
    models: list[str], base: str | None, comfyui: Path | None, adapters: list[str]
) -> dict[str, str | SingleFiles]:
    """Name -> model; `--base` and `--comfyui` are for the single files among them."""
    from libreflux.workflows.adapters import default_model

    files = [model for model in models if model.lower().endswith(".safetensors")]
    if not models or (not files and (base or comfyui)):
        one = chosen_model(models[0] if models else None, base, comfyui) or default_model(adapters)
        return {str(one): one, **{model: model for model in models[1:]}}
    chosen = (chosen_model(model, *((base, comfyui) if model in files else (None, None))) for model in models)
    return {str(one): one for one in chosen if one is not None}


@dataclass(frozen=True)
class _Identity:
    """What is known of a model before it is opened: its facts under the adapters, and the keys of its cells."""

    facts: Facts
    key: Mapping[str, object]
    older: Sequence[object]
    """As the first versions knew it: by the weights of transformer and adapters, and the paths of single files."""

    def steps(self, column: Column) -> int:
        return column.steps or self.facts.steps

    def guidance(self, column: Column) -> float:
        own = 1.0 if self.facts.guidance_embeds else self.facts.guidance
        return float(own if column.guidance is None else column.guidance)

    @property
    def embedded(self) -> float | None:
        return self.facts.guidance if self.facts.guidance_embeds else None


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
        from libreflux.data.digests import FileMemory

        self.out, self.common, self.adapters, self.device, self.offload = out, common, adapters, device, offload
        self.quantize: Literal["int8"] | None = "int8" if "quantize" in common else None
        self.sources = sources
        self.columns, self.rows, self.total = columns, rows, len(columns) * len(rows)
        self.made = 0
        self._memory = FileMemory(out)
        self._opened: tuple[str, Chosen, Opened] | None = None
        self._identities: dict[str, _Identity] = {}

    def drawn(self) -> list[list[Cell]]:
        """By column and row; what is not kept is drawn now."""
        from libreflux.cli.progress import progress
        from libreflux.data.digests import FileMemory

        missing = [column for column in self.columns for row in self.rows if self._kept(column, *row) is None]
        self._memory.save()
        self._memory = FileMemory(self.out)  # which knows what was saved
        total = sum(self._identity(column.model).steps(column) for column in missing)
        done = 0
        cells: list[list[Cell]] = []
        with progress("drawing", "step") as report:
            for column in self.columns:
                cells.append([])
                for prompt, seed in self.rows:
                    if (cell := self._kept(column, prompt, seed)) is None:
                        note = f"cell {self.made + 1:,} of {len(missing):,}"
                        before = done

                        def told(step: Step, before: int = before, note: str = note) -> None:
                            report(before + step.index + 1, total, note)

                        cell = self._draw(column, prompt, seed, told)
                        done += cell[1].steps
                    cells[-1].append(cell)
        return cells

    def _kept(self, column: Column, prompt: str, seed: int) -> Cell | None:
        """The cell, if it is there and whole; of a model that was called something else then, under today's name."""
        from libreflux.decided import adopt
        from libreflux.sample.metadata import read_record

        path, older, model = self._path(column, prompt, seed), self._older(column, prompt, seed), column.model
        with contextlib.suppress(LibrefluxError, OSError):
            if not path.exists() and self._fits(read_record(older), column):
                adopt(path, older)
            return path, dataclasses.replace(read_record(path), model=model)
        return None

    def _fits(self, record: GenerationRecord, column: Column) -> bool:
        """Whether nothing that a cell of an older version says of itself is otherwise today."""
        is_of = self._identity(column.model)
        now = (is_of.steps(column), is_of.guidance(column), is_of.embedded)
        return (record.steps, record.guidance, record.embedded_guidance) == now

    def _path(self, column: Column, prompt: str, seed: int) -> Path:
        from libreflux.sample.model_key import FORMULA

        is_of, common = self._identity(column.model), self.common
        scale = is_of.guidance(column)
        return self._file({
            "formula": FORMULA, "prompt": prompt, "seed": seed, "negative": common["negative"] if scale > 1 else "",
            "steps": is_of.steps(column), "guidance": scale, "width": common["width"], "height": common["height"],
            "quantize": self.quantize, **is_of.key,
        })  # fmt: skip

    def _older(self, column: Column, prompt: str, seed: int) -> Path:
        return self._file([asdict(column), prompt, seed, self.common, self._identity(column.model).older])

    def _file(self, decided: object) -> Path:
        from libreflux.decided import digest

        return self.out / "cells" / f"{digest(decided)[:24]}.png"

    def _identity(self, model: str) -> _Identity:
        """Of hashes: nothing is loaded into memory, and no file is read that has not changed since the last grid."""
        if model not in self._identities:
            from libreflux.model.source import open_model
            from libreflux.sample.model_key import adapters_key, facts_key, model_key
            from libreflux.workflows.adapters import adapted_facts, load_arguments

            source, files = self.sources[model], load_arguments(self.adapters)
            known, facts = model_key(source, self._memory), adapted_facts(open_model(source).facts, files)
            others = [] if isinstance(source, str) else [repr(source)]
            older = [known["transformer"], [[file.sha256, weight] for file, weight in files], *others]
            key = {"model": known, "adapters": adapters_key(files), "facts": facts_key(facts)}
            self._identities[model] = _Identity(facts, key, older)
        return self._identities[model]

    def _draw(self, column: Column, prompt: str, seed: int, told: Callable[[Step], None]) -> Cell:
        from libreflux.sample.metadata import save_png

        path = self._path(column, prompt, seed)
        chosen, opened = self._open(column.model)
        record = opened.stamped(self._wanted(chosen, column, prompt, seed))
        save_png(opened.draw(record, told), path, record)
        self.made += 1
        return path, record

    def _open(self, model: str) -> tuple[Chosen, Opened]:
        """The model, ready for every cell of its columns: their texts are encoded together, before it is loaded."""
        from libreflux.cli.drawing import open_for_drawing

        if self._opened is None or self._opened[0] != model:
            self._opened = None  # before the next one needs the memory
            chosen = open_for_drawing(self.sources[model], self.adapters, self.device, self.offload, self.quantize)
            columns = [column for column in self.columns if column.model == model]
            wanted = [self._wanted(chosen, column, *row) for column in columns for row in self.rows]
            self._opened = model, chosen, chosen.load(wanted, self._memory.sha256)
        return self._opened[1:]

    def _wanted(self, chosen: Chosen, column: Column, prompt: str, seed: int) -> GenerationRecord:
        from libreflux.sample.metadata import GenerationRecord

        width, height = (int(self.common[name] or chosen.size) for name in ("width", "height"))
        check_picture(width, height, column.steps)
        is_of = self._identity(column.model)
        scale = is_of.guidance(column)
        return GenerationRecord(
            prompt=prompt, seed=seed, negative=str(self.common["negative"]) if scale > 1 else "",
            steps=is_of.steps(column), guidance=scale, width=width, height=height, model=column.model,
            embedded_guidance=is_of.embedded, quantize=chosen.quantize,
        )  # fmt: skip
