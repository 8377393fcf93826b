"""`compile` in recipes: the steps are those of a plain run, and a run goes on as it was begun."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.exc import InductorError

from libreflux.errors import ModelError, RunError
from libreflux.model import compiling
from libreflux.recipe import Recipe, load_recipe
from libreflux.training import checkpoint, compiled
from libreflux.training.callbacks import StepInfo
from libreflux.training.interrupt import Interrupted
from libreflux.training.loop import fit
from libreflux.training.step import Training
from libreflux.workflows.dry_run import dry_run
from training.recorded import Recorder, Tree

SMALL = {"adapter": {"targets": [{"layers": "**.attn.to_q", "factor": 4}]}, "batch": 1}


class Listener(Recorder):
    """Keeps the notices too."""

    def __init__(self) -> None:
        super().__init__()
        self.notices: list[str] = []

    def on_notice(self, line: str) -> None:
        self.notices.append(line)


class NotCompiled:
    """In the place of `CompiledBlocks`: compiles nothing."""

    def __init__(self, transformer: object) -> None:
        pass

    def news(self) -> str | None:
        return None


def trained(tree: dict[str, Any]) -> Listener:
    heard = Listener()
    fit(Recipe.model_validate(tree), heard)
    return heard


def state_of(run: Path) -> dict[str, Any]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return newest.state()


def test_compiled_steps_are_those_of_a_plain_run(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = functools.partial(compiling.CompiledBlocks, backend="aot_eager")
    monkeypatch.setattr(compiled, "CompiledBlocks", captured)
    tree = recipe_tree(tmp_path / "run", **SMALL, steps=3)
    tree["data"] = [{**tree["data"][0], "caption_dropout": 0}]  # an empty prompt would have graphs of its own
    found, wanted = (trained({**tree, "compile": asked, "out": str(tmp_path / asked)}) for asked in ("on", "off"))
    assert [info.loss for info in found.steps] == pytest.approx([info.loss for info in wanted.steps], rel=1e-5)
    assert found.notices[0] == "blocks are compiled: 2 kinds, at their first calls"
    assert found.notices[1].startswith("compiled 2 kinds of block in ")
    assert len(found.notices) == 2  # captions of several lengths, and no graph more
    assert found.notices[1].endswith("(2 graphs so far)")
    assert wanted.notices == []
    assert state_of(tmp_path / "on")["compiled"] is True
    assert "compiled" not in state_of(tmp_path / "off")


def test_a_run_goes_on_as_it_was_begun(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "CompiledBlocks", NotCompiled)
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    run = tmp_path / "run"
    tree = recipe_tree(run, **SMALL)
    trained({**tree, "steps": 1, "compile": "on"})
    assert trained({**tree, "steps": 2}).notices == ["blocks are compiled, as they were before"]
    assert state_of(run)["compiled"] is True
    assert "last bits" not in caplog.text
    assert trained({**tree, "steps": 3, "compile": "off"}).notices == []
    assert "resumed with plain blocks instead of compiled ones: the result may differ in its last bits" in caplog.text
    assert trained({**tree, "steps": 4}).notices == []
    assert "compiled" not in state_of(run)
    trained({**tree, "steps": 5, "compile": "on"})
    assert "resumed with compiled blocks instead of plain ones" in caplog.text


def test_another_kind_of_device_decides_anew(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, {}, {"compiled": True, "device": "cuda (NVIDIA H100)"})
    assert compiled._before(folder, "cuda:1") is True
    assert compiled._before(folder, "cpu") is None


def test_without_a_compiler_on_is_refused_before_anything_is_read(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: "there is no compiler")
    tree = recipe_tree(tmp_path / "run", compile="on", model="no-such-model")
    with pytest.raises(RunError, match=r"^compile: there is no compiler; hint: set compile: off$"):
        fit(Recipe.model_validate(tree))


def test_a_signal_that_ends_the_compiler_too_ends_the_run_as_others_do(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C goes to the whole group of processes: g++ ends, and torch says that it cannot compile."""
    monkeypatch.setattr(compiled, "CompiledBlocks", NotCompiled)
    own = Training.take_step

    def interrupted(training: Training) -> StepInfo:
        if training.step == failing:
            if signalled:
                os.kill(os.getpid(), signal.SIGINT)
            raise InductorError(RuntimeError("C++ compile error\nand more"), None)
        return own(training)

    monkeypatch.setattr(Training, "take_step", interrupted)
    recipe = Recipe.model_validate(recipe_tree(tmp_path / "run", **SMALL, steps=3, compile="on"))
    failing, signalled = 0, True
    with pytest.raises(Interrupted, match="before the first step was done; the same command begins again") as stopped:
        fit(recipe)
    assert stopped.value.step == 0
    failing = 1
    with pytest.raises(Interrupted, match="after step 1, saved in") as stopped:
        fit(recipe)
    assert (stopped.value.signum, stopped.value.step) == (signal.SIGINT, 1)
    assert state_of(tmp_path / "run")["compiled"] is True
    signalled = False
    with pytest.raises(ModelError, match=r"^the backward pass of a block: cannot be compiled .*C\+\+ compile error;"):
        fit(recipe)


def test_a_dry_run_tells_it_for_a_card(recipe_tree: Tree, tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path / "run", **SMALL, steps=300_000, compile="auto", device="cuda")
    told = dry_run(tree)
    assert told.compile is not None
    assert told.compile.startswith("compile: auto; blocks are compiled: about 120 s to compile, and ")
    assert f"\n{told.compile}\n" in told.text(width=200)
    assert dry_run({**tree, "device": "cpu"}).compile is None
    folder = checkpoint.write(tmp_path / "run", 1, {}, {"compiled": True, "device": "cuda (NVIDIA H100)"})
    assert dry_run(tree).compile == "compile: auto; blocks are compiled, as they were before"
    (folder.path / "state.json").write_text("{", encoding="utf-8")
    assert dry_run(tree).compile == told.compile
    shutil.rmtree(folder.path)
    assert dry_run({**tree, "steps": 2}).compile == (
        "compile: auto; blocks are not compiled: about 120 s to compile, and 0 s saved in 2 passes (estimated)"
    )


def test_an_adversary_has_three_passes_a_step(recipe_tree: Tree, tmp_path: Path) -> None:
    student = {"objective": "distil", "distil": {"steps": 4, "adversarial": {"width": 8}}}
    tree = recipe_tree(tmp_path / "run", **SMALL, **student, steps=2, accumulate=2, compile="auto", device="cuda")
    assert str(dry_run(tree).compile).endswith("0 s saved in 12 passes (estimated)")


def test_a_dry_run_says_that_a_compiler_is_missing(
    recipe_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: "there is no compiler")
    found = dry_run(recipe_tree(tmp_path / "run", **SMALL, compile="on"))
    assert found.compile is None
    assert str(found.fault) == "compile: there is no compiler; hint: set compile: off"


def test_words_that_yaml_reads_as_truth(recipe_tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for written, meant in (("on", "on"), ("off", "off"), ('"on"', "on"), ("auto", "auto")):
        path.write_text(json.dumps(recipe_tree(tmp_path / "run"))[:-1] + f', "compile": {written}}}', encoding="utf-8")
        recipe = load_recipe(path)
        assert recipe.compile == meant
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == recipe
        assert load_recipe(path, ["compile=off"]).compile == "off"
