"""The quickest cases of the tests for a card, on the CPU: they must still run when somebody has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu.alone import RESULT, alone, process
from gpu.cases import passes, training
from gpu.recipes import tree
from libreflux.emoji import compose

ON_CPU = {"LIBREFLUX_TEST_DEVICE": "cpu"}


def test_a_pass_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "DEVICE", "cpu")
    monkeypatch.setattr(passes, "SIDE", 4)
    monkeypatch.setattr(passes, "LENGTHS", {"masked": (12, 7)})
    found = passes.compare("fp32")
    assert set(found) == {"masked", "masked, checkpointing"}
    for row in found.values():
        assert row.pop("norm") > 0
        assert set(row) == {"velocity", "loss", "gradient"}
        assert max(row.values()) < 1e-6


def test_a_pass_with_waiting_blocks_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "DEVICE", "cpu")
    monkeypatch.setattr(passes, "SIDE", 4)
    for kind, row in passes.offloaded("int8").items():
        assert row.pop("norm") > 0, kind
        assert set(row.values()) == {0.0}, kind


def test_a_training_is_compared(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "DEVICE", "cpu")
    photos = compose.write_folder(tmp_path / "photos", 10, 1, pairs=0.0)
    places = {"tiny": tiny_model_dir, "photos": photos, "out": tmp_path / "run"}
    found = training.beside_the_cpu(tree("tiny", "lokr", "bf16", "adamw", places, steps=4), 2)
    there, here = found["there"], found["here"]
    assert there["rows"][:2] == here["rows"]
    assert len(there["rows"]) == 4
    assert len({row["data"]["noise"] for row in there["rows"]}) == 4
    assert there["held_out"][1] < there["held_out"][0]
    assert not here["held_out"]


def test_a_case_has_a_process_of_its_own_and_a_failure_shows_its_log() -> None:
    arguments = json.dumps({"head_dim": 64, "dtype": "fp32"})
    done = process(["-m", "gpu.cases", "passes.attention", arguments], environment=ON_CPU)
    assert done.code == 0, done.log()
    assert RESULT in done.out, done.log()
    with pytest.raises(pytest.fail.Exception, match=r"No module named 'gpu\.cases\.nowhere'"):
        alone("nowhere.nothing")
    slow = process(["-c", "import os, time; os.system('sleep 60') if not print('begun', flush=True) else 0"], seconds=2)
    assert slow.code is None
    assert slow.out == "begun\n"
    assert slow.log().startswith("out of time")
