"""Which of the kept pictures are shown beside one another: rows of models, columns of what is varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from libreflux.probing.results import Coordinate, Picture, Result

PROMPTS = 2
"""Prompts shown of each kind."""
SCALES = (1.0, 2.0, 4.0, 6.0)
COLUMNS = 4


@dataclass(frozen=True)
class Grid:
    """One prompt by models and something that is varied.

    Attributes:
        what: is varied, in words.
        prompt: of all pictures.
        heads: of the columns.
        remarks: one for each model.
        rows: files by model and column, None where there is no picture.
    """

    what: str
    prompt: str
    heads: Sequence[str]
    remarks: Sequence[str]
    rows: Sequence[Sequence[Path | None]]


def grids(results: Sequence[Result]) -> list[Grid]:
    """Over guidance, few and many steps, and seeds: what every model has pictures of."""
    own = [f"guidance {float(one.settings.get('own_guidance', 1.0)):g}" for one in results]
    none = ["" for _ in results]
    guided = [_index(one, "guidance", "guidance") for one in results]
    stepped = [_index(one, "steps", "steps") for one in results]
    plain = [_index(one, "seeds", "seed", guidance=1.0) for one in results]
    found = _grids("Guidance", guided, "guidance {:g}", none, PROMPTS, SCALES)
    found += _grids("Few and many steps", stepped, "{:g} steps", own, PROMPTS, columns=2)
    return found + _grids("Seeds, without guidance", plain, "seed {:g}", none, 1)


Index = dict[tuple[str, float], Path]
"""(prompt, column) → file."""


def _index(result: Result, purpose: str, column: str, **at: Coordinate) -> Index:
    kept = [one for one in result.pictures if one.purpose == purpose and one.at.items() >= at.items()]
    found: Index = {}
    for one in kept:
        found.setdefault((str(one.at["prompt"]), float(one.at[column])), _file(result, one))
    return found


def _file(result: Result, picture: Picture) -> Path:
    if result.folder is None:
        raise ValueError(f"the result of {result.model['name']} has pictures and no folder")
    return result.folder / picture.file


def _grids(
    what: str,
    tables: Sequence[Index],
    head: str,
    remarks: Sequence[str],
    prompts: int,
    wanted: Sequence[float] = (),
    columns: int = COLUMNS,
) -> list[Grid]:
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    found = []
    for prompt in list(dict.fromkeys(prompt for prompt, _ in shared))[:prompts]:
        there = [column for name, column in shared if name == prompt]
        chosen = [column for column in there if column in wanted]
        chosen = chosen if len(chosen) > 2 else there[:columns]
        rows = [[table.get((prompt, column)) for column in chosen] for table in tables]
        found.append(Grid(what, prompt, [head.format(column) for column in chosen], remarks, rows))
    return found
