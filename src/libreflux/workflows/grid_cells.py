"""The pictures of a grid: each drawn once, kept under a name that holds all that decided it, and found again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from libreflux.data.digests import FileMemory
from libreflux.errors import LibrefluxError
from libreflux.flow.solve import Step
from libreflux.model.compile_choice import Compile
from libreflux.model.device import pick_device
from libreflux.model.facts import Facts
from libreflux.model.opening import FilesSource
from libreflux.model.source import ModelSource
from libreflux.model.w8a8 import kind_for
from libreflux.result_key import adopt, digest
from libreflux.sample.metadata import GenerationRecord, read_record, save_png
from libreflux.sample.model_key import FORMULA, adapters_key, facts_key, first_steps_key, model_key
from libreflux.values import is_guided
from libreflux.workflows.adapters import adapted_facts, load_arguments
from libreflux.workflows.drawing import AdaptedSource, DrawingSession, open_for_drawing
from libreflux.workflows.guidance_options import (
    GuidanceOptions,
    check_first_steps,
    first_fields,
    nag_fields,
    reads_negative,
    rule_fields,
)
from libreflux.workflows.picture_options import Offload, OffloadBlocks, Quantize, check_picture
from libreflux.workflows.progress import Progress


@dataclass(frozen=True)
class Column:
    """What a column of the grid is drawn with; None is the model's own."""

    model: str
    steps: int | None
    guidance: float | None


@dataclass(frozen=True)
class Row:
    """What a row of the grid is drawn from: a text, and the seed of its noise."""

    prompt: str
    seed: int

    @property
    def label(self) -> str:
        """As the sheet and the page show it."""
        return f"{self.prompt}, seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """One picture of a grid: its file, and how it was made, its model under today's name."""

    path: Path
    record: GenerationRecord


@dataclass(frozen=True)
class CellOptions:
    """What all cells of a grid share.

    Attributes:
        sources: name of a column's model to the model, open.
        adapters: put on every model, `PATH[:WEIGHT]`.
        negative: negative prompt, of the cells that are guided.
        width, height: pixels; None is the model's own size.
        device, quantize, offload, offload_blocks, compile, on_notice: see `GenerateOptions`.
        guiding: how the cells that are guided are.
        first: who draws their first steps; None is no other model.
    """

    sources: Mapping[str, ModelSource]
    adapters: Sequence[str] = ()
    negative: str = ""
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    quantize: Quantize | None = None
    offload: Offload = "auto"
    offload_blocks: OffloadBlocks = 0
    compile: Compile = "auto"
    on_notice: Callable[[str], None] | None = None
    guiding: GuidanceOptions = field(default_factory=GuidanceOptions)
    first: ModelSource | None = None

    def negative_at(self, scale: float) -> str:
        """The negative prompt of a cell, which is of no effect without guidance."""
        elsewhere = reads_negative(self.guiding, None if self.first is None else self.first.facts)
        return self.negative if is_guided(scale) or elsewhere else ""

    def guidance_fields(self, scale: float) -> dict[str, Any]:
        """What a cell's record says of guidance beyond its scale."""
        first = first_fields(self.guiding, None if self.first is None else self.first.facts)
        return {**rule_fields(self.guiding, scale), **nag_fields(self.guiding), **first}


@dataclass(frozen=True)
class CellModel:
    """What is known of a model before it is opened.

    Attributes:
        facts: the model's, under the adapters.
        key: what of model and adapters decides its cells.
        older: as the first versions knew it: the weights of transformer and adapters, and the paths of single files.
    """

    facts: Facts
    key: Mapping[str, object]
    older: Sequence[object]

    def steps(self, column: Column) -> int:
        """Sampling steps of a column's cells."""
        return column.steps or self.facts.steps

    def guidance(self, column: Column) -> float:
        """Guidance scale of a column's cells."""
        return float(self.facts.cfg_scale if column.guidance is None else column.guidance)


class Cells:
    """Pictures by column and row; a model is opened when its first missing one is asked for.

    Args:
        out: folder of the grid; the pictures are in its folder `cells`.
        shared: what all of them share.
        columns, rows: of the grid.

    Attributes:
        made: how many have been drawn, and not found.
    """

    def __init__(self, out: Path, shared: CellOptions, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        self.out, self.shared, self.columns, self.rows = out, shared, columns, rows
        self.made = 0
        self._memory = FileMemory(out)
        self._opened: tuple[str, AdaptedSource, DrawingSession] | None = None
        self._models: dict[str, CellModel] = {}

    def drawn(self, progress: Progress) -> list[list[Cell]]:
        """By column and row; what is not kept is drawn now."""
        missing = [column for column in self.columns for row in self.rows if self.kept(column, row) is None]
        self._memory.save()
        self._memory = FileMemory(self.out)  # which knows what was saved
        total = sum(self.model(column).steps(column) for column in missing)
        done = 0
        cells: list[list[Cell]] = []
        with progress("drawing", "step") as report:
            for column in self.columns:
                cells.append([])
                for row in self.rows:
                    if (cell := self.kept(column, row)) is None:
                        note = f"cell {self.made + 1:,} of {len(missing):,}"

                        def told(step: Step, before: int = done, note: str = note) -> None:
                            report(before + step.index + 1, total, note)

                        cell = self.draw(column, row, told)
                        done += cell.record.steps
                    cells[-1].append(cell)
        return cells

    def kept(self, column: Column, row: Row) -> Cell | None:
        """The cell, if it is there and whole; of a model that was called something else then, under today's name."""
        path, older = self.path(column, row), self._older(column, row)
        with contextlib.suppress(LibrefluxError, OSError):
            if not path.exists() and older.is_file() and self._fits(read_record(older), column):
                adopt(path, older)
            if path.exists():
                return Cell(path, dataclasses.replace(read_record(path), model=column.model))
        return None

    def path(self, column: Column, row: Row) -> Path:
        """Where the cell is kept: under a digest of all that decides its pixels."""
        model, shared = self.model(column), self.shared
        scale = model.guidance(column)
        decided: dict[str, Any] = {
            "formula": FORMULA,
            "prompt": row.prompt,
            "seed": row.seed,
            "negative": shared.negative_at(scale),
            "steps": model.steps(column),
            "guidance": scale,
            "width": shared.width,
            "height": shared.height,
            "quantize": self._quantised(),
            **shared.guidance_fields(scale),
            **model.key,
            **({"below_one": True} if 0 < scale < 1 else {}),  # older versions drew it with the prompt alone
        }
        if shared.first is not None:
            decided["first_steps_from"] = first_steps_key(decided["first_steps_from"], shared.first, self._memory)
        return self._file(decided)

    def _quantised(self) -> str | None:
        """With what activations are rounded to, which the device decides."""
        asked = self.shared.quantize
        return f"w8a8 {kind_for(pick_device(self.shared.device))}" if asked == "w8a8" else asked

    def model(self, column: Column) -> CellModel:
        """Of hashes: nothing is loaded into memory, and no file is read that has not changed since the last grid."""
        name = column.model
        if name not in self._models:
            source, files = self.shared.sources[name], load_arguments(self.shared.adapters)
            known, facts = model_key(source, self._memory), adapted_facts(source.facts, files)
            others = [repr(source.files)] if isinstance(source, FilesSource) else []
            older = [known["transformer"], [[file.sha256, weight] for file, weight in files], *others]
            key = {"model": known, "adapters": adapters_key(files), "facts": facts_key(facts)}
            self._models[name] = CellModel(facts, key, older)
        return self._models[name]

    def draw(self, column: Column, row: Row, on_step: Callable[[Step], None]) -> Cell:
        """The cell, drawn and kept."""
        path = self.path(column, row)
        source, session = self._open(column.model)
        record = session.stamped(self._record(source, column, row))
        save_png(session.draw(record, on_step), path, record)
        self.made += 1
        return Cell(path, record)

    def _fits(self, record: GenerationRecord, column: Column) -> bool:
        """Whether nothing that a cell of an older version says of itself is otherwise today."""
        model = self.model(column)
        now = (model.steps(column), model.guidance(column), model.facts.embedded_guidance)
        plain = not self.shared.guidance_fields(now[1])  # no older version knew of these
        return plain and (record.steps, record.guidance, record.embedded_guidance) == now and record.below_one

    def _older(self, column: Column, row: Row) -> Path:
        """Where the first versions kept the cell."""
        shared = self.shared
        common: dict[str, Any] = {"negative": shared.negative, "width": shared.width, "height": shared.height}
        if shared.quantize is not None:
            common["quantize"] = shared.quantize
        return self._file([asdict(column), row.prompt, row.seed, common, self.model(column).older])

    def _file(self, decided: object) -> Path:
        return self.out / "cells" / f"{digest(decided)[:24]}.png"

    def _open(self, model: str) -> tuple[AdaptedSource, DrawingSession]:
        """The model, ready for every cell of its columns: their texts are encoded together, before it is loaded."""
        if self._opened is None or self._opened[0] != model:
            self._opened = None  # before the next one needs the memory
            shared = self.shared
            memory = shared.offload, shared.quantize, shared.offload_blocks
            how = *memory, shared.compile, shared.on_notice, shared.first
            source = open_for_drawing(shared.sources[model], shared.adapters, shared.device, *how)
            columns = [column for column in self.columns if column.model == model]
            missing = [(column, row) for column in columns for row in self.rows if self.kept(column, row) is None]
            wanted = [self._record(source, column, row) for column, row in missing]
            self._opened = model, source, source.load(wanted, self._memory.sha256)
        return self._opened[1:]

    def _record(self, source: AdaptedSource, column: Column, row: Row) -> GenerationRecord:
        width, height = self.shared.width or source.size, self.shared.height or source.size
        check_picture(width, height, column.steps)
        model = self.model(column)
        check_first_steps(self.shared.guiding, model.steps(column))
        scale = model.guidance(column)
        return GenerationRecord(
            prompt=row.prompt,
            seed=row.seed,
            negative=self.shared.negative_at(scale),
            steps=model.steps(column),
            guidance=scale,
            width=width,
            height=height,
            model=column.model,
            embedded_guidance=model.facts.embedded_guidance,
            quantize=source.quantize,
            **self.shared.guidance_fields(scale),
        )
