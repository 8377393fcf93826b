"""docs/freedom.csv: what writes it, and that the README's numbers are its numbers."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from libreflux.probing.freedom import freedom
from libreflux.probing.results import Measure, Result

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_freedom_first", ROOT / "benchmarks" / "freedom_first.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _result(name: str, value: float) -> Result:
    spread = [value + 0.001 * step for step in (-2, -1, 0, 1, 2)]
    levels = [
        Measure(
            name="loss",
            at={"sigma": sigma, "text": "caption"},
            subset="all",
            value=value,
            low=spread[0],
            high=spread[-1],
            replicates=spread,
        )
        for sigma in (0.5, 0.9)
    ]
    return Result(
        model={"name": name},
        settings={"own_guidance": 1.0},
        versions={},
        seconds=0.0,
        measures=levels,
        pictures=[],
        folder=Path("."),
    )


def test_rows_of_the_csv_have_values_intervals_and_the_share_that_is_closed(benchmark: ModuleType) -> None:
    results = {name: _result(name, value) for name, value in (("schnell", 0.5), ("freed", 0.2), ("base", 0.1))}
    freed = {"freed": freedom(results["freed"], results["schnell"], results["base"])}
    rows = [
        dict(zip(benchmark.COLUMNS, row, strict=True)) for row in benchmark.csv_rows("steps", results, freed, "all")
    ]
    at = {(row["place"], row["model"]): row for row in rows}
    assert len(at) == len(rows) == 9
    mean = at["sigma all, caption", "freed"]
    assert (mean["value"], mean["low"]) == ("0.200", "")
    assert (mean["freedom"], mean["verdict"]) == ("75", "gap")
    one = at["sigma 0.9, caption", "schnell"]
    assert (one["value"], one["low"], one["high"]) == ("0.500", "0.498", "0.502")
    assert (one["freedom"], one["verdict"]) == ("", "")


def test_the_stored_table_has_these_columns_and_the_readmes_numbers(benchmark: ModuleType) -> None:
    with (ROOT / "docs" / "freedom.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == benchmark.COLUMNS
    found = {
        (f"{row['measure']}, {row['place']}", row["model"]): row
        for row in rows
        if (row["table"], row["subjects"]) == ("steps", "all")
    }
    readme = (ROOT / "README.md").read_text("utf-8")
    table = re.findall(r"^\| .*?`(.+?)` *\| ([\d.-]+) \| ([\d.-]+) \| (\d+) % \| ([\d.-]+) \|$", readme, re.MULTILINE)
    assert len(table) == 4
    for measure, schnell, libre, share, base in table:
        assert found[measure, "schnell"]["value"] == schnell
        assert found[measure, "emoji-libre"]["value"] == libre
        assert found[measure, "emoji-libre"]["freedom"] == share
        assert found[measure, "base"]["value"] == base
