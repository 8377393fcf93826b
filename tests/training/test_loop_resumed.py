"""fit() on a run folder: how it resumes to the bit, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libreflux import files
from libreflux.errors import AdapterError, RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit
from training.recorded import Recorder, Tree
from training.recorded import recorded_fit as _fit

# ---- how it resumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "threads", "base"), [("adamw", 1, "bf16"), ("adamw_bf16", 2, "int8"), ("adamw_bf16", 1, "w8a8")]
)
def test_stopped_runs_resume_to_the_bit(recipe_tree: Tree, tmp_path: Path, kind: str, threads: int, base: str) -> None:
    changes: dict[str, Any] = {
        "threads": threads,
        "steps": 3,
        "base": base,
        "save": {"every": 100},
        "optimizer": {"kind": kind, "learning_rate": 1e-2, "schedule": "linear"},
    }
    _, expected = _fit(recipe_tree(tmp_path / "whole", **changes))
    torch.manual_seed(12345)  # the global generator is nobody's business
    stopped = recipe_tree(tmp_path / "stopped", **changes)
    for step, signum in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(Interrupted) as stop:
            _fit(stopped, at={("step", step): lambda signum=signum: os.kill(os.getpid(), signum)})
        assert (stop.value.step, stop.value.exit_code) == (step, 128 + signum)
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
        newest = checkpoint.latest(tmp_path / "stopped")
        assert newest is not None
        assert newest.step == step
        assert not (tmp_path / "stopped" / checkpoint.ADAPTER).exists()
        saved = {**load_file(newest.adapter), **load_file(newest.optimizer)}
        assert all(
            ".lokr_w" in name or name.endswith(".alpha") or name in ("step", "rounding") for name in saved
        )  # no base weight
    recorder, resumed = _fit(stopped)
    assert recorder.events[0] == ("start", 2)
    assert resumed.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("moment", [("sample", 0), ("sample", 2), ("save", 2), ("sample", 3), ("step", 4)])
def test_a_signal_at_any_moment_saves_once_and_loses_nothing(
    recipe_tree: Tree, tmp_path: Path, moment: tuple[str, int]
) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4, samples={"every": 1, "at_start": True, "prompts": ["a fox"]})
    interrupted = Recorder(at={moment: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    if moment == ("step", 4):  # nothing is left to stop
        assert fit(Recipe.model_validate(tree), interrupted).is_file()
        return
    with pytest.raises(Interrupted) as stop:
        fit(Recipe.model_validate(tree), interrupted)
    assert stop.value.step == moment[1]
    newest = checkpoint.latest(tmp_path / "run")
    assert (newest.step if newest else 0) == moment[1]
    recorder, _ = _fit(tree)
    done = [step for event, step in interrupted.events + recorder.events if event == "step"]
    assert done == [1, 2, 3, 4]


def test_a_longer_run_is_the_continued_shorter_one(recipe_tree: Tree, tmp_path: Path) -> None:
    _, whole = _fit(recipe_tree(tmp_path / "whole", steps=5))
    _fit(recipe_tree(tmp_path / "grown", steps=3))
    recorder, grown = _fit(recipe_tree(tmp_path / "grown", steps=5))
    assert recorder.events[0] == ("start", 3)
    assert grown.read_bytes() == whole.read_bytes()
    recorder, again = _fit(recipe_tree(tmp_path / "grown", steps=5))
    assert recorder.events == []  # done is done: nothing is loaded
    assert again.read_bytes() == whole.read_bytes()
    with pytest.raises(RunError, match="step 5 is done already"):
        _fit(recipe_tree(tmp_path / "grown", steps=4))


def test_a_damaged_checkpoint_costs_its_steps_not_the_run(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4)
    _, expected = _fit(tree)
    result = expected.read_bytes()
    expected.unlink()
    last = checkpoint.step_folder(tmp_path / "run", 4)
    (last / checkpoint.OPTIMIZER).write_bytes((last / checkpoint.OPTIMIZER).read_bytes()[:-7])
    recorder, again = _fit(tree)
    assert recorder.events[:2] == [("start", 2), ("step", 3)]
    assert again.read_bytes() == result
    lines = [json.loads(line) for line in (tmp_path / "run" / checkpoint.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_seed_and_seed_alone_decides(recipe_tree: Tree, tmp_path: Path) -> None:
    _, one = _fit(recipe_tree(tmp_path / "one", steps=2))
    _, other = _fit(recipe_tree(tmp_path / "other", steps=2, seed=1))
    first, second = load_file(one), load_file(other)
    assert all(not torch.equal(first[name], second[name]) for name in first if name.endswith("lokr_w2"))


def test_a_resumed_run_draws_the_samples_that_a_kill_may_have_cost(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", steps=4, samples={"every": 2, "prompts": ["a fox"]})
    with pytest.raises(Interrupted):
        _fit(tree, at={("step", 2): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    recorder, _ = _fit(tree)
    assert recorder.events[:3] == [("start", 2), ("sample", 2), ("step", 3)]


# ---- what it refuses ----------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_before_anything_is_loaded(recipe_tree: Tree, tmp_path: Path) -> None:
    _fit(recipe_tree(tmp_path / "run", steps=2))
    with pytest.raises(RunError, match=r"batch \(2 -> 1\), seed \(0 -> 9\)"):
        _fit(recipe_tree(tmp_path / "run", steps=4, batch=1, seed=9))


def test_changed_data_is_refused(recipe_tree: Tree, tmp_path: Path, pictures_dir: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _fit(recipe_tree(tmp_path / "run", steps=2, data=[{"path": str(folder)}]))
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(RunError, match="pictures, captions or encoders have changed"):
        _fit(recipe_tree(tmp_path / "run", steps=4, data=[{"path": str(folder)}]))


def test_a_changed_base_is_refused(recipe_tree: Tree, tmp_path: Path) -> None:
    from tiny import make_tiny_model, tiny_transformer

    model = make_tiny_model(tmp_path / "model")
    _fit(recipe_tree(tmp_path / "run", steps=2, model=str(model)))
    tiny_transformer(seed=1).save_pretrained(model / "transformer")
    with pytest.raises(RunError, match="weights of the base model have changed"):
        _fit(recipe_tree(tmp_path / "run", steps=4, model=str(model)))


def test_a_run_folder_in_use_is_refused_at_once(recipe_tree: Tree, tmp_path: Path) -> None:
    with files.lock(tmp_path / "run"), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        _fit(recipe_tree(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.LOCK]


def test_the_thread_count_is_given_back(recipe_tree: Tree, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    recorder = Recorder(at={("step", 1): lambda: counts.append(torch.get_num_threads())})
    counts: list[int] = []
    fit(Recipe.model_validate(recipe_tree(tmp_path / "run", steps=1, threads=before + 1)), recorder)
    assert (counts, torch.get_num_threads()) == ([before + 1], before)


def test_a_world_without_a_launcher_is_refused(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="start it by torchrun"):
        _fit(recipe_tree(tmp_path / "run"))


def test_eight_bit_moments_are_refused_at_once_without_cuda(recipe_tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"adamw_8bit: 8-bit moments need a CUDA device; hint: use adamw_bf16"):
        _fit(recipe_tree(tmp_path / "run", optimizer={"kind": "adamw_8bit"}))
    assert not (tmp_path / "cache").exists()


def test_a_misspelt_pattern_is_refused_before_preparing_and_can_be_mended(recipe_tree: Tree, tmp_path: Path) -> None:
    wrong = {"targets": [{"layers": "transformer_block.**", "factor": 4}]}
    with pytest.raises(AdapterError, match="matches no linear layer"):
        _fit(recipe_tree(tmp_path / "run", adapter=wrong))
    assert not (tmp_path / "cache").exists()
    assert checkpoint.listed(tmp_path / "run") == []
    _, adapter = _fit(recipe_tree(tmp_path / "run", steps=1))  # the mended recipe is not "changed": nothing had begun
    assert adapter.is_file()


@pytest.mark.parametrize(
    ("kept", "told"), [("arithmetic", "arithmetic 2 instead of 1"), ("activations", "int8 from here")]
)
def test_what_was_computed_otherwise_before_is_said(
    recipe_tree: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str, told: str
) -> None:
    """A run of a version that did not count its arithmetic yet; one that was begun where activations are e4m3."""
    tree = recipe_tree(tmp_path / "run", base="w8a8", steps=1)
    _fit(tree)
    newest = checkpoint.latest(tmp_path / "run")
    assert newest is not None
    file = newest.path / "state.json"
    state = json.loads(file.read_text())
    if kept == "arithmetic":
        del state[kept]
    else:
        state[kept] = "fp8"
    file.write_text(json.dumps(state))
    files.write_manifest(newest.path)
    _fit({**tree, "steps": 2})
    assert told in caplog.text
