"""The end of `libreflux train`: what a kill there costs, what is said, and that what is said can be done."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from libreflux.adapter.targets import lokr_row
from libreflux.cli.train import summary
from libreflux.model.facts import Facts
from libreflux.model.opening import open_model
from libreflux.recipe import load_recipe
from libreflux.training.callbacks import Started
from libreflux.training.loop import fit
from libreflux.workflows.next_steps import commands
from libreflux.workflows.run_record import RunRecorder

LAYERS = [lokr_row(f"single_transformer_blocks.{n}.norm.linear", 3072, 9216, 8, "**") for n in range(38)]
WATCHED = ["steps=4", "samples.every=2", "samples.guidance=[1]", "tensorboard=true", "save.every=2"]


@pytest.fixture(autouse=True)
def board_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files by name: second, process, number. In one process and second, 10 would come before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def left(run: Path) -> dict[str, bytes]:
    """Every file that does not differ by its clock or its database's pages."""
    files = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".png")]
    files += [run / "held_out.jsonl", run / "recipe.json", *run.glob("checkpoints/*/*.json")]
    return {str(path.relative_to(run)): path.read_bytes().replace(str(run).encode(), b"RUN") for path in files}


def on_board(run: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    return {
        "loss": [event.step for event in board.Scalars("loss")],
        "samples": [event.step for event in board.Images("samples")],
    }


def dies_before(name: str, step: int, patch: pytest.MonkeyPatch) -> None:
    """From here on the process dies where a step's sheet is begun, before it is a file, or where it is measured."""
    if name == "file":
        told = RunRecorder.on_sample

        def die(*_: object) -> None:
            raise Killed

        def on_sample(self: RunRecorder, at: int, transformer: object) -> None:
            if at == step:
                patch.setattr("libreflux.workflows.run_record.save_png", die)
            told(self, at, transformer)

        patch.setattr(RunRecorder, "on_sample", on_sample)
        return
    real = getattr(RunRecorder, name)

    def listen(self: RunRecorder, at: int, *things: object) -> None:
        if at == step:
            raise Killed
        real(self, at, *things)

    patch.setattr(RunRecorder, name, listen)


@pytest.fixture(scope="module")
def undisturbed(run: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from libreflux.emoji import compose

    folder = tmp_path_factory.mktemp("undisturbed")
    apart = compose.write_folder(folder / "apart", 4, 7)
    done = run(
        "train", recipe, f"out={folder / 'run'}", f"held_out={{path: {apart}, every: 2, sigmas: [0.5]}}", *WATCHED
    )
    assert done.code == 0, done.err
    assert on_board(folder / "run") == {"loss": [1, 2, 3, 4], "samples": [2, 4]}
    return folder / "run"


@pytest.mark.parametrize(
    ("moment", "step"),
    [("on_sample", 2), ("on_sample", 4), ("file", 2), ("file", 4), ("on_measure", 4), ("on_save", 4)],
)
def test_a_killed_run_leaves_every_file_of_one_that_was_not(
    run: Callable, recipe: Path, undisturbed: Path, tmp_path: Path, moment: str, step: int
) -> None:
    apart = undisturbed.parent / "apart"
    changes = [f"out={tmp_path / 'run'}", f"held_out={{path: {apart}, every: 2, sigmas: [0.5]}}", *WATCHED]
    told = load_recipe(recipe, changes)
    with pytest.MonkeyPatch.context() as patch:
        dies_before(moment, step, patch)
        with pytest.raises(Killed), RunRecorder(told) as shown:
            fit(told, shown)
    again = run("train", recipe, *changes)
    assert again.code == 0, again.err
    if step == 4:
        assert "all 4 steps are done; what was due after the last one is made now" in again.err
    found, expected = left(tmp_path / "run"), left(undisturbed)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert on_board(tmp_path / "run") == {"loss": [1, 2, 3, 4], "samples": [2, 4]}


def test_sheets_of_steps_that_are_taken_again_go(run: Callable, recipe: Path, tmp_path: Path) -> None:
    common = ["train", recipe, f"out={tmp_path / 'run'}", "samples.guidance=[1]", "save.every=1"]
    assert run(*common, "steps=2", "samples.every=1").code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert run(*common, "steps=2", "samples.every=3").code == 0
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]


# ---- what is said -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["runs/first", "-my 'run' $HOME; *", "a:0.5"])
def test_what_a_finished_run_advises_works_when_it_is_pasted(
    run: Callable, recipe: Path, in_folder: Path, name: str
) -> None:
    common = ["train", recipe, f"out={json.dumps(name)}", "steps=1", "samples.every=0", f"cache={in_folder / 'cache'}"]
    done = run(*common, 'samples={every: 0, prompts: ["--a fox"]}' if name.startswith("-") else "samples.every=0")
    assert (done.code, done.out) == (0, f"adapter: {name}/adapter.safetensors\n"), done.err
    assert "finished: its one step is done\nwhat can be done with it:\n  libreflux generate --model " in done.err
    pasted = [line.strip() for line in done.err.splitlines() if line.startswith("  libreflux ")]
    assert [shlex.split(line)[1] for line in pasted] == ["generate", "average", "merge"]
    for line in pasted:
        result = run(*shlex.split(line)[1:])
        assert result.code == 0, (line, result.err)
    again = run(*common[:-2], f"cache={in_folder / 'cache'}")
    assert again.code == 0
    assert "this run was finished before: its one step is done; raise steps to go on" in again.err
    pasted = [line.strip() for line in again.err.splitlines() if line.startswith("  libreflux ")]
    assert all(not os.path.lexists(shlex.split(line)[shlex.split(line).index("--out") + 1]) for line in pasted)


def test_without_averages_none_is_advised(recipe: Path) -> None:
    assert [shlex.split(line)[1] for line in commands(load_recipe(recipe, ["ema=[]"]))] == ["generate", "merge"]


STARTED = Started(
    run=Path("runs/first"),
    step=0,
    steps=20000,
    pictures=8,
    epoch_steps=1,
    source=open_model("emoji-base"),
    facts=Facts(),
    resolved=LAYERS,
    start_norm=0.00123,
)


@pytest.mark.parametrize("width", [120, 80, 60, 40])
@pytest.mark.parametrize("layers", [False, True])
def test_the_first_words_are_few_and_keep_to_the_width(width: int, layers: bool) -> None:
    lines = summary(STARTED, layers, width)
    assert max(map(len, lines)) <= width
    told = " ".join(lines)
    assert told.startswith("begins: 20,000 steps, 8 pictures, 1 step an epoch adapter: lokr of factor 8 on 38 layers, ")
    assert ("(--layers lists them)" in told) != layers
    assert ("count" in told) == layers
    assert "padding" not in told
    assert "run folder: runs/first" in told
    assert len(lines) <= (5 if width >= 80 else 8) + 3 * layers


def test_a_resumed_run_says_where_it_goes_on() -> None:
    lines = summary(replace(STARTED, step=500, start_norm=None), False, 80)
    assert lines[0] == "resumes after step 500: 20,000 steps, 8 pictures, 1 step an epoch"


def test_layers_are_listed_on_request(run: Callable, recipe: Path, tmp_path: Path) -> None:
    common = ["train", recipe, "steps=1", "samples.every=0", f"cache={tmp_path / 'cache'}"]
    listed, silent = (run(*common, f"out={tmp_path / name}", *more) for name, more in (("a", ["--layers"]), ("b", [])))
    assert (listed.code, silent.code) == (0, 0)
    assert "transformer_blocks.0.attn.to_q" in listed.err
    assert "attn.to_q" not in silent.err
