"""Killed, torn or out of disk at every single operation on its files, a run loses at most one interval and no byte."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

EVERY = 1
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def faults(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, pictures_dir: Path
) -> dict[str, tuple[Path, Outcome]]:
    """Two processes, "kill" and the others: folder of the runs, and what became of them."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = {
        "model": str(tiny_model_dir),
        "base": "fp32",
        "data": [{"path": str(pictures_dir)}],
        "resolution": 32,
        "adapter": {"targets": [{"layers": "single_transformer_blocks.0.**", "factor": 4}]},
        "batch": 1,
        "steps": 3,
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
        "ema": [0.1],
        "samples": {"every": 0},
        "save": {"every": EVERY, "keep": 1, "averages_every": 1},
        "threads": 1,
    }

    def run(names: tuple[str, ...]) -> tuple[Path, Outcome]:
        out = folder / names[0]
        out.mkdir()
        path = out / "recipe.yaml"
        path.write_text(json.dumps(recipe | {"cache": str(out / "cache")}), encoding="utf-8")
        script = Path(__file__).with_name("fork_faults.py")
        command = [sys.executable, str(script), str(path), str(out), *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return out, json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor() as pool:
        parts = {"kill": ("kill",), "full": ("full", "tear")}
        return dict(zip(parts, pool.map(run, parts.values()), strict=True))


def _contents(run: Path) -> dict[str, bytes]:
    names = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != "recipe.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in names}


def _litter(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock"]


def test_bytes_are_synced_before_they_get_their_name_and_its_folder_right_after(
    faults: dict[str, tuple[Path, Outcome]],
) -> None:
    _, outcome = faults["kill"]
    for run in (outcome["first"], outcome["whole"]):
        assert run["code"] == 0, run
        assert run["order"] == []
        assert {"open", "fsync", "os.rename", "os.mkdir"} <= {point.split()[0] for point in run["points"]}
    assert len(outcome["whole"]["points"]) > 60


def test_a_run_killed_at_any_point_ends_with_the_same_bytes(faults: dict[str, tuple[Path, Outcome]]) -> None:
    folder, outcome = faults["kill"]
    expected = _contents(folder / "whole")
    assert {"adapter.safetensors", "averages/step-00000001/ema.safetensors"} <= set(expected)
    assert len(outcome["broken"]) == len(outcome["whole"]["points"])
    for result in outcome["broken"]:
        run, where = folder / result["run"], result["point"]
        assert result["code"] == -9, where
        assert result["left"]["unloadable"] == [], where
        assert result["left"]["step"] >= 1, where
        assert result["left"]["lost"] <= EVERY, where
        assert result["again"]["code"] == 0, (where, result["again"]["said"])
        found = _contents(run)
        assert sorted(found) == sorted(expected), where
        assert [name for name in expected if found[name] != expected[name]] == [], where
        assert _litter(run) == [], where


@pytest.mark.parametrize("fault", ["tear", "full"])
def test_a_half_written_file_or_a_full_disk_costs_no_saved_step(
    faults: dict[str, tuple[Path, Outcome]], fault: str
) -> None:
    folder, outcome = faults["full"]
    results = [result for result in outcome["broken"] if result["run"].startswith(fault)]
    assert len(results) > 10
    for result in results:
        run, where = folder / result["run"], result["point"]
        if fault == "tear":
            assert result["code"] in (-25, 0), where  # SIGXFSZ; 0: nothing more was written
        else:
            _one_line(result, run)
        assert result["left"]["unloadable"] == [], where
        assert result["left"]["step"] >= 1, where
        assert result["left"]["lost"] <= EVERY, where
        assert _litter(run) == [], where


def _one_line(result: Outcome, run: Path) -> None:
    """Exit code 2; what is wrong, where, and the hint."""
    assert result["code"] == 2, (result["point"], result["said"])
    [line] = result["said"]
    assert line.startswith(f"libreflux: error: {run}"), line
    assert ": No space left on device; hint: " in line
    assert ".staging-" not in line
    assert ".tmp-" not in line
