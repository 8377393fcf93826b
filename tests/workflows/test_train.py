"""Training and its dry run called from Python: the command's files, nothing printed, and what a caller hears."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from libreflux import files
from libreflux.cli import main
from libreflux.emoji import compose
from libreflux.errors import DataError, RecipeError, RunError
from libreflux.recipe import load_recipe
from libreflux.workflows.dry_run import dry_run
from libreflux.workflows.train import train
from libreflux.workflows.train_events import TrainEvents

RECIPE = """\
model: {model}
base: fp32
data: [{{path: pictures}}]
held_out: {{path: apart, every: 2, sigmas: [0.3, 0.7]}}
resolution: 32
adapter: {{targets: [{{layers: "transformer_blocks.*.attn.**", factor: 4}}]}}
batch: 2
steps: 4
optimizer: {{learning_rate: 1e-2}}
samples: {{every: 2, at_start: true, prompts: ["a red apple"], guidance: [1, 3]}}
save: {{every: 2}}
out: run
"""


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe, pictures and held-out pictures."""
    compose.write_folder(tmp_path / "pictures", 5, 1)
    compose.write_folder(tmp_path / "apart", 3, 7)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*args: str) -> int:
    with mock.patch.object(sys, "argv", ["libreflux", *args]), pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def written(run: Path) -> dict[str, bytes]:
    """What must be the same; what a run knows of its place and its time is left out."""
    kept = [run / "adapter.safetensors", run / "held_out.jsonl", *run.glob("samples/*.png")]
    kept += run.glob("checkpoints/*/*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def test_python_and_the_command_write_the_same_bytes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("train", "recipe.yaml") == 0
    (folder / "run").rename(folder / "by-command")
    capfd.readouterr()
    result = train("recipe.yaml")
    assert capfd.readouterr() == ("", "")
    expected, found = written(folder / "by-command"), written(folder / "run")
    assert {"adapter.safetensors", "held_out.jsonl", *(f"samples/step-0000000{n}.png" for n in (0, 2, 4))} < set(found)
    assert len([name for name in found if name.startswith("checkpoints/step-00000002/")]) > 0
    assert found == expected
    assert (result.adapter, result.run, result.started_at) == (Path("run/adapter.safetensors"), Path("run"), 0)
    assert (result.stopped, result.rank, result.recipe) == (None, 0, load_recipe(Path("recipe.yaml")))
    assert train(Path("recipe.yaml")).started_at is None  # it was finished
    assert train(load_recipe(Path("recipe.yaml")), overrides=["steps=5"]).started_at == 4


class Heard(TrainEvents):
    """Writes down what it hears of, in order, each kind once."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.kinds: list[str] = []
        self.sheets: list[Path] = []
        self.measured: list[int] = []

    def hear(self, kind: str) -> None:
        if kind not in self.kinds:
            self.kinds.append(kind)

    def on_prepare(self, done: int, total: int, note: str = "") -> None:
        self.hear("prepare")

    def on_data(self, found: Any) -> None:
        self.hear(f"data {found.pictures}")

    @contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        self.hear("stage")
        yield

    def on_start(self, started: Any) -> None:
        self.hear(f"start {started.step}")

    def on_step(self, info: Any) -> None:
        self.hear("step")
        if info.step == self.stop_at:
            signal.raise_signal(signal.SIGINT)

    def on_measuring(self, step: int, done: int, total: int) -> None:
        self.hear(f"measuring of {total}")

    def on_measured(self, step: int, found: Any) -> None:
        self.measured.append(step)

    def on_sheet(self, step: int, path: Path) -> None:
        assert path.read_bytes()[:4] == b"\x89PNG"
        self.sheets.append(path)

    def on_save(self, step: int, folder: Path) -> None:
        self.hear(f"save {step}")

    def on_end(self) -> None:
        self.hear("end")


def test_a_caller_hears_of_everything_and_a_signal_stops_a_run_that_goes_on_to_the_same_bytes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = Heard()
    train("recipe.yaml", events=whole)
    order = ["prepare", "data 5", "data 3", "stage", "start 0", "measuring of 3", "step", "save 2", "save 4", "end"]
    assert sorted(whole.kinds) == sorted(order)
    assert whole.kinds[-1] == "end"
    assert whole.kinds.index("start 0") < whole.kinds.index("measuring of 3") < whole.kinds.index("step")
    assert whole.measured == [0, 2, 4]
    assert whole.sheets == [Path(f"run/samples/step-0000000{step}.png") for step in (0, 2, 4)]
    expected = written(folder / "run")
    (folder / "run").rename(folder / "whole")

    stopped = Heard(stop_at=2)
    result = train("recipe.yaml", events=stopped)
    assert result.adapter is None
    assert result.stopped is not None
    assert (result.stopped.signum, result.stopped.step, result.stopped.exit_code) == (signal.SIGINT, 2, 130)
    assert stopped.kinds[-1] == "end"
    assert stopped.measured == [0]
    again = train("recipe.yaml")
    assert (again.started_at, again.stopped) == (2, None)
    assert written(folder / "run") == expected
    assert capfd.readouterr().out == ""


def test_a_refused_run_leaves_no_folder_and_a_second_trainer_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        train("recipe.yaml", overrides=["data.0.path=nowhere", "cache=cache"])
    assert not (folder / "run").exists()
    with pytest.raises(RecipeError, match="no such recipe"):
        train("other.yaml")
    (folder / "run").mkdir()
    with files.lock(folder / "run"):
        monkeypatch.setitem(sys.modules, "libreflux.training.loop", None)  # an import of it would fail
        with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
            train("recipe.yaml")


def test_of_several_processes_the_result_says_which_this_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("recipe.yaml", overrides=["samples.every=0", "held_out={}", "steps=1"])
    monkeypatch.setattr("libreflux.training.loop.fit", lambda recipe, *_, **__: Path(recipe.out, "adapter.safetensors"))
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with files.lock(folder / "run"):  # the first one holds it for all
        result = train("recipe.yaml", overrides=["samples.every=0", "held_out={}", "steps=1"])
    assert result.rank == 1


# ---- recipes as Python has them -----------------------------------------------------------------------------------


def test_a_recipe_may_be_a_tree_of_values(folder: Path, tiny_model_dir: Path) -> None:
    tree = {
        "model": tiny_model_dir,  # a Path is a text in a recipe
        "data": [{"path": folder / "pictures"}],
        "resolution": (32,),
        "steps": 1,
        "out": "run",
    }
    found = dry_run(tree, overrides=["data.0.repeats=2", "batch=3"])
    assert (found.recipe.batch, found.recipe.data[0].repeats, found.recipe.resolution) == (3, 2, (32,))
    assert tree["data"] == [{"path": folder / "pictures"}]  # the caller's tree stays
    changed = dry_run(found.recipe, overrides=["steps=7"]).recipe
    assert changed == found.recipe.model_copy(update={"steps": 7})
    with pytest.raises(RecipeError, match="steps"):
        dry_run({**tree, "stepps": 1})


def test_a_dry_run_is_numbers_and_writes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    found = dry_run("recipe.yaml")
    assert capfd.readouterr() == ("", "")
    assert sorted(folder.rglob("*")) == before
    assert found.verdict.fits == "fits"
    assert found.fault is None
    assert found.time_left is None
    assert found.forecast is not None
    assert (found.forecast.pictures, found.forecast.visits) == (8, 5.0)
    assert dict(found.disk.parts)["all"] == sum(size for _, size in found.disk.parts[:-2]) > 0
    assert len(found.plan.layers) > 0
    assert "fits: at its peak" in found.text(100)
    bad = dry_run("recipe.yaml", overrides=["data.0.path=nowhere"])
    assert isinstance(bad.fault, DataError)
    assert bad.forecast is None
    assert "the cache comes on top: nowhere: no such folder" in bad.text(200)
    full = dry_run("recipe.yaml", overrides=["save.keep=1000000000", "save.every=1", "steps=1000000000"])
    assert isinstance(full.fault, RunError)
    assert full.disk.too_small
    assert full.text(200).count("too little is free") == 1


def test_the_command_prints_the_report_of_the_workflow(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict(os.environ, {"COLUMNS": "90"}):
        assert command("train", "recipe.yaml", "--dry-run", "--all") == 0
    told = capfd.readouterr().out
    expected = dry_run("recipe.yaml").text(90, whole=True) + "\n"
    free = "free in"  # other programs use the same disk
    assert [line for line in told.splitlines() if free not in line] == [
        line for line in expected.splitlines() if free not in line
    ]
