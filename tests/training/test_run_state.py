"""Where a run folder stands: what a kill near the end costs, and what a second start would write over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libreflux.data.unchanged import data_hash_now
from libreflux.errors import RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, Started
from libreflux.training.loop import fit

Tree = Callable[..., dict[str, Any]]
STEPS = 4


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Watcher(Callbacks):
    """Keeps what is drawn and measured; dies in the event that it is told, before that has left anything."""

    def __init__(self, dies: tuple[str, int] | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.dies = dies

    def tell(self, event: str, step: int) -> None:
        if (event, step) == self.dies:
            raise Killed
        self.events.append((event, step))

    def on_start(self, started: Started) -> None:
        self.tell("start", started.step)

    def on_sample(self, step: int, transformer: Any) -> None:
        self.tell("sample", step)

    def on_measure(self, step: int, transformer: Any, held_out: Any) -> None:
        self.tell("measure", step)


def run(tree: dict[str, Any], dies: tuple[str, int] | None = None, *, fork: bool = False) -> list[tuple[str, int]]:
    heard = Watcher(dies)
    if dies is None:
        fit(Recipe.model_validate(tree), heard, fork=fork)
    else:
        with pytest.raises(Killed):
            fit(Recipe.model_validate(tree), heard)
    return heard.events


@pytest.fixture(scope="module")
def finished(recipe_tree: Tree, share: float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a finished run of `STEPS` steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    tree = recipe_tree(
        out,
        steps=STEPS,
        ema=[0.1],
        save={"every": 2, "keep": 2, "averages_every": 2},
        samples={"every": 2, "prompts": ["a fox"]},
        held_out={"share": share, "every": 3},
    )
    assert run(tree) == [
        ("start", 0),
        ("measure", 0),
        ("sample", 2),
        ("measure", 3),
        ("measure", 4),
        ("sample", 4),
    ]
    return tree


@pytest.fixture
def again(finished: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A copy of that run, with its recipe."""
    shutil.copytree(finished["out"], tmp_path / "run")
    return {**finished, "out": str(tmp_path / "run")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ---- a kill after the last checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("dies", [("measure", STEPS), ("sample", STEPS)])
def test_what_the_last_step_leaves_is_made_by_the_same_command(again: dict[str, Any], dies: tuple[str, int]) -> None:
    result = Path(again["out"]) / checkpoint.ADAPTER
    expected = result.read_bytes()
    shutil.rmtree(checkpoint.step_folder(result.parent, STEPS))
    result.unlink()
    run(again, dies)
    assert [one.step for one in checkpoint.listed(result.parent)] == [2, STEPS]
    assert not result.exists()
    assert run(again) == [("start", STEPS), ("measure", STEPS), ("sample", STEPS)]
    assert result.read_bytes() == expected
    assert run(again) == []  # done is done: nothing is loaded


def test_where_nothing_is_due_after_the_last_step_nothing_is_loaded_for_the_result(again: dict[str, Any]) -> None:
    result = Path(again["out"]) / checkpoint.ADAPTER
    expected = result.read_bytes()
    result.unlink()
    assert (
        run({**again, "samples": {"every": 3, "prompts": ["a fox"]}, "held_out": {**again["held_out"], "every": 0}})
        == []
    )
    assert result.read_bytes() == expected


def test_a_damaged_result_is_written_again(again: dict[str, Any]) -> None:
    result = Path(again["out"]) / checkpoint.ADAPTER
    expected = result.read_bytes()
    result.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert run(again) == []
    assert result.read_bytes() == expected
    result.write_bytes(expected[:-9])
    run(again)
    assert result.read_bytes() == expected


# ---- what would be written over -----------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / checkpoint.FOLDER)


def without_checkpoints_and_recipe(run: Path) -> None:
    without_checkpoints(run)
    (run / checkpoint.RECIPE).unlink()


def with_damaged_checkpoints(run: Path) -> None:
    for one in checkpoint.listed(run):
        one.optimizer.write_bytes(b"gone")


def with_metrics_alone(run: Path) -> None:
    for name in (checkpoint.FOLDER, "averages"):
        shutil.rmtree(run / name)
    (run / checkpoint.ADAPTER).unlink()


def with_averages_alone(run: Path) -> None:
    shutil.rmtree(run / checkpoint.FOLDER)
    for name in (checkpoint.ADAPTER, checkpoint.METRICS):
        (run / name).unlink()


def with_sheets_alone(run: Path) -> None:
    with_metrics_alone(run)
    (run / checkpoint.METRICS).unlink()
    (run / "samples").mkdir()
    (run / "samples" / "step-00000004.png").write_bytes(b"a sheet")


def without_recipe(run: Path) -> None:
    (run / checkpoint.RECIPE).unlink()


def of_another_base(run: Path) -> None:
    rewrite(run / checkpoint.ADAPTER, lambda tensors, metadata: metadata.update(model_hash="0" * 64))


def of_other_layers(run: Path) -> None:
    rewrite(run / checkpoint.ADAPTER, lambda tensors, metadata: tensors.__delitem__(next(iter(tensors))))


def of_another_seed(run: Path) -> None:
    rewrite(run / checkpoint.ADAPTER, lambda tensors, metadata: metadata.update(recipe="0" * 64))


def of_no_run(run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.clear()
        metadata["format"] = "pt"

    rewrite(run / checkpoint.ADAPTER, change)


@pytest.mark.parametrize("steps", [STEPS, STEPS + 2])
@pytest.mark.parametrize(
    ("loses", "told"),
    [
        (without_checkpoints, "there is a result, .*checkpoints/ was removed"),
        (without_checkpoints_and_recipe, "there is a result, .*checkpoints/ was removed"),
        (with_damaged_checkpoints, "there is a result, .*no checkpoint in it can be read"),
        (with_metrics_alone, r"metrics\.jsonl knows step 4, .*move metrics\.jsonl away"),
        (with_averages_alone, "averages/ knows step 4, .*move averages/ away"),
        (with_sheets_alone, "samples/ knows step 4, .*move samples/ away"),
        (without_recipe, r"there are checkpoints but no recipe\.json"),
        (of_another_base, "this run has not made this file; hint: move it away"),
        (of_other_layers, "this run has not made this file; hint: move it away"),
        (of_another_seed, "this run has not made this file; hint: move it away"),
        (of_no_run, "this run has not made this file; hint: move it away"),
    ],
)
def test_nothing_is_written_over(again: dict[str, Any], loses: Callable[[Path], None], told: str, steps: int) -> None:
    folder = Path(again["out"])
    loses(folder)
    left = set(contents(folder).values())
    with pytest.raises(RunError, match=told):
        run({**again, "steps": steps})
    assert set(contents(folder).values()) == left


def test_a_kill_before_the_first_checkpoint_and_a_moved_result_begin_again(
    again: dict[str, Any], recipe_tree: Tree, tmp_path: Path
) -> None:
    tree = recipe_tree(tmp_path / "new", steps=2, save={"every": 2}, samples={"every": 1, "prompts": ["a fox"]})
    run(tree, ("sample", 1))
    assert run(tree)[0] == ("start", 0)
    without_checkpoints(Path(again["out"]))
    for name in (checkpoint.ADAPTER, checkpoint.METRICS):
        (Path(again["out"]) / name).rename(tmp_path / name)
    shutil.rmtree(Path(again["out"]) / "averages")
    assert run(again)[0] == ("start", 0)
    assert (Path(again["out"]) / checkpoint.ADAPTER).read_bytes() == (tmp_path / checkpoint.ADAPTER).read_bytes()


def test_where_the_last_checkpoints_were_removed_the_result_stays_until_it_is_trained_again(
    again: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(checkpoint.step_folder(Path(again["out"]), STEPS))
    expected = (Path(again["out"]) / checkpoint.ADAPTER).read_bytes()
    run(again, ("measure", STEPS))
    assert (Path(again["out"]) / checkpoint.ADAPTER).read_bytes() == expected
    assert (
        "is of step 4 and stays until that is trained again: the newest checkpoint that can be read is of 2"
        in caplog.text
    )


# ---- data of a finished run ---------------------------------------------------------------------------------------


@pytest.fixture
def own_data(recipe_tree: Tree, pictures_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe of a finished run on pictures of its own, in two sources."""
    sources = []
    for name, numbers in (("a", (0, 1, 2)), ("b", (3, 4))):
        (tmp_path / name).mkdir()
        for number in numbers:
            for path in pictures_dir.glob(f"{number}.*"):
                shutil.copy2(path, tmp_path / name)
        sources.append({"path": str(tmp_path / name)})
    tree = recipe_tree(tmp_path / "run", steps=1, data=sources)
    run(tree)
    return tree


def test_a_finished_run_says_that_its_data_have_changed(own_data: dict[str, Any], tmp_path: Path) -> None:
    assert run(own_data) == []
    caption = tmp_path / "a" / "0.txt"
    before = caption.read_text()
    caption.write_text("another caption")
    result = (tmp_path / "run" / checkpoint.ADAPTER).read_bytes()
    with pytest.raises(RunError, match=r"its one step is done, and its pictures, captions or encoders have changed"):
        run(own_data)
    with pytest.raises(RunError, match="step 1, the last, is done already: nothing is left to fork"):
        run(own_data, fork=True)
    caption.write_text(before)
    assert run(own_data) == []
    with pytest.raises(RunError, match="encoders have changed"):  # raising steps would be refused for it
        run({**own_data, "text_precision": "bf16"})
    (tmp_path / "b" / "4.png").rename(tmp_path / "4.png")
    (tmp_path / "b" / "4.txt").rename(tmp_path / "4.txt")
    with pytest.raises(RunError, match="hint: raise steps and go on with `fork`, put them back"):
        run(own_data)
    assert (tmp_path / "run" / checkpoint.ADAPTER).read_bytes() == result
    assert run({**own_data, "steps": 2}, fork=True) == [("start", 1)]
    assert run({**own_data, "steps": 2}) == []  # what the fork took is what the run is of now


def test_a_finished_run_whose_data_are_gone_still_has_its_result(
    own_data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "a")
    with caplog.at_level(logging.WARNING):
        assert run(own_data) == []
    assert "this run is finished, and its data cannot be looked at: " in caplog.text
    shutil.rmtree(tmp_path / "cache")
    assert run(own_data) == []


def test_the_hash_of_data_needs_no_encoding(finished: dict[str, Any], own_data: dict[str, Any]) -> None:
    for tree in (finished, own_data):
        newest = checkpoint.latest(Path(tree["out"]))
        assert newest is not None
        assert data_hash_now(Recipe.model_validate(tree)) == newest.state()["data_hash"]
