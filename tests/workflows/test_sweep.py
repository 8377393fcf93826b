"""`libreflux average --sweep`: candidates of a tiny run, judged, drawn, kept and resumed; and the memory they take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import libreflux
from census import Census
from libreflux.adapter.io import attach_file
from libreflux.data.held_out import HeldOut
from libreflux.emoji import compose
from libreflux.errors import LibrefluxError, OptionError, RunError
from libreflux.probing.held_out import measure_held_out
from libreflux.training import hindsight
from libreflux.workflows.progress import Report
from libreflux.workflows.sweep import SweepResult
from libreflux.workflows.sweep_candidates import candidates_of
from workflows.test_examples import example_of

RANK = 7
QUICK: dict[str, Any] = {
    "lerps": [0.3, 0.9],
    "widths": [0.1],
    "sigmas": [0.3, 0.8],
    "pictures": 4,
    "guidance": [3],
    "steps": 1,
    "batch": 4,
}


@pytest.fixture(scope="module")
def many(tiny_model_dir: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with six checkpoints and averages of two widths; read it only."""
    run = tmp_path_factory.mktemp("many") / "run"
    libreflux.train(
        {
            "model": str(tiny_model_dir),
            "base": "fp32",
            "data": [{"path": str(pictures)}],
            "resolution": 32,
            "adapter": {"kind": "lora", "rank": RANK, "targets": [{"layers": "**"}]},
            "batch": 2,
            "steps": 6,
            "optimizer": {"learning_rate": 3e-2},
            "ema": [0.05, 0.15],
            "save": {"every": 1, "keep": 9, "averages_every": 1},
            "out": str(run),
        }
    )
    return run


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures that the run was not trained on."""
    return compose.write_folder(tmp_path_factory.mktemp("apart") / "apart", 4, 9)


@pytest.fixture(scope="module")
def swept(many: Path, apart: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("swept")
    return libreflux.sweep(many, data=apart, report=folder / "report", out=folder / "best.safetensors", **QUICK)


def test_all_candidates_are_there_the_best_first(swept: SweepResult) -> None:
    assert {row.name for row in swept.rows} == {"step 6, the last", "LERP 0.3", "LERP 0.9", "width 0.1"}
    scores = [row.score for row in swept.rows]
    assert scores == sorted(scores)
    assert swept.made == 4
    assert swept.rows[0].to_best == (0.0, 0.0, 0.0)
    assert swept.table.last.to_last == (0.0, 0.0, 0.0)
    assert "not held out" not in swept.page.read_text()


def test_the_winner_is_the_average_that_the_command_makes(many: Path, swept: SweepResult, tmp_path: Path) -> None:
    best = swept.rows[0]
    options: dict[str, Any] = {"lerp": {"lerp": best.value}, "width": {"width": best.value}, "last": {"lerp": 1.0}}
    option = options[best.kind]
    libreflux.average(many, out=tmp_path / "same.safetensors", **option)
    made, same = load_file(swept.out or ""), load_file(tmp_path / "same.safetensors")
    assert all(torch.equal(made[name], same[name]) for name in same)
    assert made.keys() == same.keys()


def test_a_candidates_loss_is_that_of_its_file(
    many: Path, apart: Path, tiny_model_dir: Path, swept: SweepResult, tmp_path: Path
) -> None:
    """By another way: the average as a file, on a model of its own, measured as training measures."""
    from libreflux.data.cache_spec import CacheSpec
    from libreflux.data.crops import View
    from libreflux.data.prepare import prepare
    from libreflux.recipe import DataSource

    libreflux.average(many, out=tmp_path / "lerp.safetensors", lerp=0.3)
    view = View("centre", 32, 16)
    spec = CacheSpec(
        model=tiny_model_dir, data=[DataSource(path=str(apart))], views=[view], text_padding="drop", out=tmp_path / "c"
    )
    cache, sources = prepare(spec)
    transformer = libreflux.open_model(str(tiny_model_dir)).load_transformer(dtype=torch.float32)
    attach_file(transformer, tmp_path / "lerp.safetensors")
    held_out = HeldOut(cache, sources, view=view, count=4)
    found = measure_held_out(transformer, held_out, sigmas=(0.3, 0.8), batch=4)
    row = next(row for row in swept.rows if row.name == "LERP 0.3")
    assert row.loss.value == pytest.approx(found.loss.value, rel=1e-5)
    assert row.slope.value == pytest.approx(found.slope.value, rel=1e-5)


def test_the_page_the_sheet_and_the_numbers(swept: SweepResult) -> None:
    told = json.loads(swept.file.read_text())
    assert told["sentence"] == swept.sentence
    assert [row["name"] for row in told["candidates"]] == [row.name for row in swept.rows]
    assert "LERP 0.9" in swept.page.read_text()
    assert "Judged on: apart." in swept.page.read_text()
    assert "Fewer than 30 pictures: intervals of values are too narrow" in swept.page.read_text()
    assert swept.sheet is not None
    assert len({name for row in swept.rows for each in row.pictures for name in each}) == 4 * 2
    assert libreflux.__version__ in swept.page.read_text()


def test_the_example_of_the_docstring_runs(
    many: Path, apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(many)
    Path("photos-apart").symlink_to(apart)
    exec("if True:\n" + example_of("sweep"), {})
    out = capsys.readouterr().out
    assert out.startswith("They ")
    assert "out/sweep/run/index.html" in out


class Stop(Exception):
    """Raised in the middle of a sweep."""


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(
    many: Path, apart: Path, swept: SweepResult, tmp_path: Path
) -> None:
    @contextmanager
    def stopping(what: str, unit: str = "step") -> Iterator[Report]:
        def report(done: int, total: int, note: str = "", begun: bool = False) -> None:
            if what == "sweeping" and done > total * 0.6:
                raise Stop

        yield report

    given = {**QUICK, "data": apart, "report": tmp_path / "report"}
    with pytest.raises(Stop):
        libreflux.sweep(many, progress=stopping, **given)
    assert not (tmp_path / "report" / "sweep.json").exists()
    again = libreflux.sweep(many, **given)
    assert 0 < again.made < 4
    for name in ("sweep.json", "index.html", "sheet.png"):
        assert (again.folder / name).read_bytes() == (swept.folder / name).read_bytes()
    once_more = libreflux.sweep(many, **{**given, "by": "slope"})
    assert once_more.made == 0
    less = {"lerps": [0.3], "widths": [], "guidance": [], "steps": None}
    other = libreflux.sweep(many, **{**given, **less, "seed": 1})
    assert other.made == 2
    assert other.sheet is None
    assert not (tmp_path / "report" / "sheet.png").exists()


def test_no_more_than_three_adapters_are_in_memory(many: Path, apart: Path, swept: SweepResult, tmp_path: Path) -> None:
    """The run has six checkpoints and twelve averages; the base, pictures and texts have no side of seven."""
    shutil.copytree(swept.folder / "cache", tmp_path / "report" / "cache")
    with Census(lambda tensor: RANK in tensor.shape) as census:
        less = {"lerps": [0.3], "sigmas": [0.5], "guidance": [], "steps": None}
        libreflux.sweep(many, data=apart, report=tmp_path / "report", **{**QUICK, **less})
    tensors = load_file(many / "adapter.safetensors").values()
    adapter = sum(tensor.numel() * 4 for tensor in tensors if RANK in tensor.shape)
    assert adapter < census.most <= 3 * adapter


def test_raw_checkpoints_stand_in_for_averages_that_were_not_tracked(trained: Path) -> None:
    kept = hindsight.kept(trained.parent)
    made = hindsight.cells_of(kept, 0.1)
    assert made.steps == [2, 3]
    without = hindsight.Kept(kept.run, kept.checkpoints, {})
    assert [one.kind for one in candidates_of(without, [0.5], [0.1], ())[0]] == ["last", "lerp", "cells"]
    naive = hindsight.cell_weights([1, 2, 3, 4], 6.94)
    edges = np.array([0, 1.5, 2.5, 3.5, 4.5]) / 4.5
    assert naive == pytest.approx(np.diff(edges**7.94))
    assert naive.sum() == pytest.approx(1.0)


def test_pictures_that_were_trained_on_are_told(many: Path, pictures: Path, tmp_path: Path, run: Callable) -> None:
    done = run(
        *("average", many, "--sweep", "--data", pictures, "--pictures", 2, "--report", tmp_path / "r", "--lerps", 0.5),
        *("--widths", "none", "--guidance", "none", "--sigmas", 0.5),
    )
    assert done.code == 0, done.err
    assert "not held out: 2 of 2 pictures were trained on" in done.out
    assert "not held out: 2 of 2 pictures were trained on" in (tmp_path / "r" / "index.html").read_text()
    assert "LERP 0.5" in done.out


def test_what_the_recipe_holds_out_is_the_default(
    tiny_model_dir: Path, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.parent, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["held_out"] |= {"share": 0.5}
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(OptionError, match="resolution: belongs to `data`"):
        libreflux.sweep(run, report=tmp_path / "r", resolution=32)
    found = libreflux.sweep(run, report=tmp_path / "r", lerps=[0.5], guidance=[], sigmas=[0.5])
    assert json.loads(found.file.read_text())["data"]["name"] == "the run's held-out share"
    assert {row.kind for row in found.rows} == {"last", "lerp", "width"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"lerps": [1.5]}, "lerps: cannot be 1.5"),
        ({"lerps": [0.5, 0.5]}, "lerps: needs 0 to 100 different numbers"),
        ({"widths": [0.5]}, "widths: cannot be 0.5"),
        ({"lerps": [], "widths": []}, "widths: without `lerps` nothing is left to compare"),
        ({"sigmas": [0.0]}, "sigmas: cannot be 0.0"),
        ({"by": "looks"}, "by: no measure 'looks'"),
        ({"pictures": 1}, "pictures: cannot be 1"),
        ({"seeds": []}, "seeds: needs 1 to 100 different numbers"),
        ({"guidance": [], "prompts": "a fox"}, "prompts: has no effect without `guidance`"),
        ({"out": "best.pt"}, "best.pt: the name of an adapter file ends in .safetensors"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
        ({"trained_on": "nowhere"}, "nowhere: no such folder"),
        ({"widths": [0.012]}, "cannot form width 0.012"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_folder(
    many: Path, wrong: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LibrefluxError, match=told):
        libreflux.sweep(many, report=tmp_path / "r", **{"data": many, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_run_with_one_checkpoint_has_nothing_to_compare(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained.parent, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with pytest.raises(RunError, match="has one checkpoint, which nothing can be compared with"):
        libreflux.sweep(run, report=tmp_path / "r")
    (run / "recipe.json").unlink()
    with pytest.raises(RunError, match=r"is no run folder: it has no recipe\.json"):
        libreflux.sweep(run, report=tmp_path / "r")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--width", 0.1, "--by", "loss", "--out", "a.safetensors"], "--by: belongs to --sweep; hint: add --sweep"),
        (["--sweep", "--lerp", 0.1], "--lerp: makes one average; hint: remove --sweep, or list them with --lerps"),
        (["--width", 0.1], "--out: is needed; hint: name the adapter file to write"),
        (["--sweep", "--guidance", "x"], "--guidance: 'x' is no list of numbers"),
    ],
)
def test_the_command_tells_what_goes_with_what(run: Callable, many: Path, given: list[object], told: str) -> None:
    done = run("average", many, *given)
    assert (done.code, told in done.err) == (2, True), done.err
