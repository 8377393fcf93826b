"""The tutorial of docs/style.md, run as it stands but for its numbers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from libreflux.model.opening import open_model

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tutorial_runs_as_written(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    recipe = (DOCS / "style.yaml").read_text("utf-8")
    small = recipe.replace("steps: 500", "steps: 2").replace("warmup: 20", "warmup: 0").replace("batch: 16", "batch: 4")
    small = small.replace("resolution: 128", "resolution: 64")
    (tmp_path / "docs" / "style.yaml").write_text(small)
    block = re.search(r"```sh\n(.*?)```", (DOCS / "style.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    text = block[1].replace("--count 400", "--count 8").replace("--guidance 3", "--guidance 3 --steps 2")
    lines = text.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["demo-data", "train", "generate", "merge"]
    for line in lines:
        done = run(*shlex.split(line)[1:])
        assert done.code == 0, done.err
    assert len(list((tmp_path / "out/style/drawn").glob("*.png"))) == 2
    assert open_model("out/style/model").facts.lineage["base"] == "emoji-base"
