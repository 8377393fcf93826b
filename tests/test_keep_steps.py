"""benchmarks/keep_steps.py: its plan, its new sets, and its table and page from results that are made up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.keep_steps import ARMS, MAIN, jobs
from benchmarks.keep_steps_page import write_results
from benchmarks.keep_steps_sets import FAMILIES, NewSet, new_sets


def share(value: float | None, by: str) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
    return {"by": by, "value": value, "low": low, "high": high, "noisy": value is None}


def result(arm: str, seed: int, points: list[tuple[int, float | None, float | None]]) -> dict[str, Any]:
    rows = [
        {"step": step, "kept": [share(kept, "FD")], "learnt": [share(learnt, "KD")], "guidance_answer": None}
        for step, kept, learnt in points
    ]
    return {"set": "look", "arm": arm, "seed": seed, "seconds": 60, "points": rows}


def test_the_table_the_plot_and_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for told in (
        result("direct", 0, [(50, 0.95, 0.2), (100, 0.5, 0.9)]),
        result("direct", 1, [(50, 0.93, 0.4), (100, None, 0.9)]),
        result("guided-3", 0, [(50, 0.97, 0.3), (100, 0.92, 0.7)]),
        result("hold-0.5", 0, [(50, None, None)]),
    ):
        path = tmp_path / "results" / f"{told['arm']}-{told['seed']}.json"
        path.write_text(json.dumps(told))
    table, plot, page = write_results(tmp_path, "a trial", MAIN)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["arm"], row["seed"], row["step"], row["kept"]) for row in rows[:2]] == [
        ("direct", "0", "50", "0.9500"),
        ("direct", "0", "100", "0.5000"),
    ]
    assert len(rows) == 7
    text = page.read_text()
    assert "Use guided-3, and stop at step 100: it has learnt 70% and kept 92%." in text
    assert "hold-0.5 †" in text
    assert "30 % [10, 30]" in text  # two seeds' mean, the first one's interval
    assert plot.read_text().startswith("<svg")
    before = [path.read_bytes() for path in (table, plot, page)]
    assert [path.read_bytes() for path in write_results(tmp_path, "a trial", MAIN)] == before


def test_the_thin_table_comes_first_and_every_arm_comes() -> None:
    sets = [NewSet(name, Path(name), Path(name)) for name in ("look", "other")]
    thin, whole = list(jobs(sets, ARMS, [0, 1, 2], thin=True)), list(jobs(sets, ARMS, [0, 1, 2], thin=False))
    assert [job.arm for job in thin] == list(MAIN)
    assert whole[: len(thin)] == thin
    assert len({job.name for job in whole}) == len(whole) == 2 * (len(ARMS) + 2 * len(MAIN))


def test_new_sets_have_halves_that_share_nothing(tmp_path: Path) -> None:
    look, subjects = new_sets(tmp_path, FAMILIES["artists"], ["look", "subjects"], {}, 4)
    names = {path.read_text() for path in look.train.glob("*.txt")}
    assert len(list(look.train.glob("*.png"))) == len(list(look.new.glob("*.png"))) == 4
    assert all(name.endswith(", in pencil\n") for name in names)
    [other] = new_sets(tmp_path / "again", FAMILIES["emoji"], ["other"], {"other": _together(tmp_path, subjects)}, 9)
    halves = [{path.read_bytes() for path in folder.glob("*.png")} for folder in (other.train, other.new)]
    assert [len(one) for one in halves] == [4, 4]
    assert not halves[0] & halves[1]
    with pytest.raises(SystemExit, match="nobody has the set subjects for this family"):
        list(new_sets(tmp_path, FAMILIES["emoji"], ["subjects"], {}, 4))


def _together(folder: Path, found: NewSet) -> Path:
    out = folder / "together"
    out.mkdir()
    for half in (found.train, found.new):
        for path in half.iterdir():
            (out / f"{half.name}-{path.name}").write_bytes(path.read_bytes())
    return out
