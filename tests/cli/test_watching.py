"""Held-out pictures while `libreflux train` works: measured, written, and without influence."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from libreflux.emoji import compose


def measured(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "held_out.jsonl").read_text().splitlines()]


def test_measuring_changes_nothing_and_a_resumed_run_writes_the_same_lines(
    run: Callable, recipe: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from libreflux.training.callbacks import StepInfo
    from libreflux.workflows.run_record import RunRecorder

    apart = compose.write_folder(tmp_path / "apart", 4, 7)
    watched = [
        "train",
        recipe,
        f"cache={tmp_path / 'cache'}",
        f"held_out={{path: {apart}, every: 1, sigmas: [0.3, 0.7]}}",
    ]
    whole = run(*watched, f"out={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    assert (tmp_path / "whole" / "adapter.safetensors").read_bytes() == trained.read_bytes()
    lines = measured(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["pictures"] == 4 and len(line["slope"]) == 2 for line in lines)
    assert len({line["loss"][0] for line in lines}) == 4
    assert "4 held-out pictures" in whole.err
    assert "step 3: held-out loss" in whole.err

    told = RunRecorder.on_step

    def interrupt(self: RunRecorder, info: StepInfo) -> None:
        told(self, info)
        if info.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_step", interrupt)
        assert run(*watched, f"out={tmp_path / 'part'}").code == 130
    assert [line["step"] for line in measured(tmp_path / "part")] == [0, 1]
    with open(tmp_path / "part" / "held_out.jsonl", "a") as file:
        file.write('{"step": 3, "loss": [9, 9]}\n{"step": 4, "lo')  # of a run that went further and was taken back
    assert run(*watched, f"out={tmp_path / 'part'}").code == 0
    assert measured(tmp_path / "part") == lines
