"""Five small captioned pictures, recipes that train on them in about a second, and processes to do it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from libreflux.data.held_out import places
from libreflux.files import sha256_file

PICTURES = 5


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        Image.fromarray(random.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        captions = ("a red apple on blue", f"a small green frog, {'very ' * number}calm")
        (folder / f"{number}.txt").write_text("\n".join(captions), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def share(pictures_dir: Path) -> float:
    """The `held_out.share` that holds out one of the five pictures."""
    ids = [sha256_file(path)[:32] for path in pictures_dir.glob("*.png")]
    return float(np.sort(places(ids))[:2].mean())


@pytest.fixture(scope="session")
def recipe_tree(tiny_model_dir: Path, pictures_dir: Path) -> Callable[..., dict[str, Any]]:
    """A recipe for a run folder, as plain values; keywords replace top-level keys."""

    def tree(out: Path, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(tiny_model_dir),
            "base": "fp32",
            "data": [{"path": str(pictures_dir)}],
            "resolution": 32,
            "adapter": {"targets": [{"layers": "**", "factor": 4}]},
            "batch": 2,
            "steps": 6,
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
            "samples": {"every": 0},
            "save": {"every": 2, "keep": 2},
            "threads": 1,
            "cache": str(out.parent / "cache"),
            "out": str(out),
            **changes,
        }

    return tree


@pytest.fixture(scope="session")
def fork_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Runs, one after another, in real processes; see fork_runs.py."""

    def run(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        plan = tmp_path_factory.mktemp("plan") / "runs.json"
        plan.write_text(json.dumps(runs), encoding="utf-8")
        script = Path(__file__).with_name("fork_runs.py")
        done = subprocess.run([sys.executable, str(script), str(plan)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return results

    return run
