"""`libreflux probe --few-steps` on a tiny run: an unchanged model, a curve, what is kept when it is interrupted."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import libreflux
from libreflux.adapter import io
from libreflux.adapter.noise import noise_like
from libreflux.errors import AdapterError, DataError, LibrefluxError, OptionError, RunError
from libreflux.workflows import few_steps_models
from libreflux.workflows.few_steps import FewStepsResult
from libreflux.workflows.progress import Report
from workflows.test_examples import example_of

PROMPTS = ["a red apple on blue", "a fox on yellow", "a frog", "a rocket on green"]


@pytest.fixture(scope="module")
def given(tiny_model_dir: Path, plain: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    others = tmp_path_factory.mktemp("others") / "others.txt"
    others.write_text("\n".join(PROMPTS))
    return {"model": str(tiny_model_dir), "data": plain, "prompts": others, "judge": judge, "resolution": 32}


@pytest.fixture(scope="module")
def curve(given: dict[str, Any], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> FewStepsResult:
    """Of the run's two checkpoints."""
    out = tmp_path_factory.mktemp("curve") / "out"
    return libreflux.probe_few_steps(**given, adapters=trained.parent, out=out)


def changed(trained: Path, path: Path, factor: float = 1.0, **metadata: str) -> Path:
    """The adapter, as strong as `factor`, with other metadata."""
    tensors = {name: one * (factor if name.endswith("w2") else 1) for name, one in load_file(trained).items()}
    with safe_open(trained, "pt") as file:
        save_file(tensors, path, {**file.metadata(), **metadata})
    return path


def test_an_adapter_that_changes_nothing_has_kept_all_and_learnt_nothing(
    given: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    nothing = changed(trained, tmp_path / "nothing.safetensors", 0.0)
    found = libreflux.probe_few_steps(**given, adapters=nothing, out=tmp_path / "out", broken=trained)
    assert found.stop == "few-step ability kept: 100 % [100, 100]; learnt: 0 % [0, 0]"
    assert found.points[0].unchanged
    assert {(one.value, one.low, one.high) for one in found.points[0].kept} == {(1.0, 1.0, 1.0)}
    assert {(one.value, one.low, one.high) for one in found.points[0].learnt} == {(0.0, 0.0, 0.0)}


def test_a_run_gives_a_curve_over_its_checkpoints(curve: FewStepsResult) -> None:
    assert [one.step for one in curve.points] == [2, 3]
    told = json.loads(curve.file.read_text())
    assert told["stop"] == curve.stop
    assert [row["step"] for row in told["points"]] == [2, 3]
    assert {row["by"] for row in told["points"][0]["kept"]} >= {"FD", "KD", "picture distance", "sharpness"}
    assert {row["role"] for row in told["models"]} == {"distilled", "broken", "adapted"}
    assert told["steps"] == 4
    page = curve.page.read_text()
    assert all(text in page for text in ("Definitions", "step 3", PROMPTS[0], "noise of the same norm", "The curve"))
    json.dumps(told, allow_nan=False)


def test_the_same_call_draws_nothing_and_finds_the_same(
    given: dict[str, Any], trained: Path, curve: FewStepsResult, tmp_path: Path
) -> None:
    before, page = json.loads(curve.file.read_text()), curve.page.read_bytes()
    table = tmp_path / "table.csv"
    again = libreflux.probe_few_steps(**given, adapters=trained.parent, out=curve.folder, csv=table)
    assert again.made == 0
    assert json.loads(curve.file.read_text()) == before
    assert curve.page.read_bytes() == page
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["model"] for row in rows} == {"distilled and broken", "step 2", "step 3"}
    assert {row["text"] for row in rows if row["over"] == "prompts"} == set(PROMPTS)
    assert {row["measure"] for row in rows if row["over"] == "pictures"} == {"judge_ceiling"}


def test_an_interrupted_check_goes_on_after_its_finished_sets(
    given: dict[str, Any], trained: Path, curve: FewStepsResult, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(curve.folder / "cache", out / "cache")

    @contextmanager
    def dying(what: str, unit: str = "") -> Iterator[Report]:
        def report(done: int, total: int, note: str = "", begun: bool = False) -> None:
            if note == "step 2":
                raise KeyboardInterrupt

        yield report

    with pytest.raises(KeyboardInterrupt):
        libreflux.probe_few_steps(**given, adapters=trained.parent, out=out, progress=dying)
    whole = next(iter(sorted((out / "seen").iterdir())))
    whole.write_bytes(whole.read_bytes()[:-9])  # half a file is none
    found = libreflux.probe_few_steps(**given, adapters=trained.parent, out=out)
    assert 0 < found.made < curve.made
    assert json.loads(found.file.read_text())["points"] == json.loads(curve.file.read_text())["points"]
    assert not list(out.rglob("*.staging*"))


def test_other_settings_are_other_pictures(given: dict[str, Any], trained: Path, curve: FewStepsResult) -> None:
    result = shutil.copytree(curve.folder, curve.folder.with_name("other"))
    fewer = libreflux.probe_few_steps(**given, adapters=trained, out=result, pictures=4)
    assert fewer.made == 2  # the new captions of two models
    weaker = libreflux.probe_few_steps(**given, adapters=f"{trained}:0.5", out=result, pictures=4)
    assert weaker.points[0].name == "step 3 at 0.5"
    assert weaker.made == 3 + 1  # the adapter's, and its noise's; guidance 3 is the model's own


def test_of_a_curve_the_tensors_of_one_point_are_held_at_a_time(
    given: dict[str, Any], trained: Path, curve: FewStepsResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive = list[weakref.ref[torch.Tensor]](), list[int]()
    plain = io.load_adapter

    def watched(path: Path) -> io.AdapterFile:
        file = plain(path)
        read.append(weakref.ref(next(iter(file.tensors.values()))))
        return file

    def noise(file: io.AdapterFile, seed: int) -> io.AdapterFile:
        alive.append(sum(one() is not None for one in read))
        return noise_like(file, seed)

    monkeypatch.setattr(io, "load_adapter", watched)
    monkeypatch.setattr(few_steps_models, "noise_like", noise)
    found = libreflux.probe_few_steps(**given, adapters=trained.parent, out=curve.folder)
    assert found.made == 0
    assert len(read) > 2
    assert alive == [1]


def test_the_example_of_the_docstring_runs(
    given: dict[str, Any], trained: Path, curve: FewStepsResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name, target in (("runs/mine", trained.parent), ("photos", given["data"]), ("others.txt", given["prompts"])):
        Path(name).symlink_to(target)
    shutil.copytree(curve.folder, tmp_path / "out")
    tiny = f'{given["model"]!r}, judge={str(given["judge"])!r}, resolution=32, out="out"'
    exec("if True:\n" + example_of("probe_few_steps").replace('"emoji-schnell"', tiny), {})
    assert json.loads(Path("out/few-steps.json").read_text())["stop"] == curve.stop


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ({"data": None}, OptionError, "few_steps: needs `data`"),
        ({"prompts": None}, OptionError, "few_steps: needs `prompts`"),
        ({"adapters": ()}, OptionError, "few_steps: nothing to check"),
        ({"adapters": (), "against": "MODEL"}, OptionError, "needs `broken`"),
        ({"data": "nowhere"}, DataError, "nowhere: no such folder"),
        ({"prompts": "nowhere.txt"}, DataError, "nowhere.txt: no such file"),
        ({"keep": 2}, OptionError, "keep: cannot be 2"),
        ({"pictures": 3}, OptionError, "pictures: cannot be 3"),
        ({"judge": None}, OptionError, "is not of the emoji family"),
        ({"adapters": "role"}, AdapterError, "is a training adapter"),
        ({"adapters": "base"}, AdapterError, r"was trained on other weights \(other\) than those of"),
        ({"model": "emoji-base"}, LibrefluxError, "draws in 28 steps: it is no few-step model"),
        ({"out": "full"}, RunError, "full: holds something else"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(
    given: dict[str, Any],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    error: type[LibrefluxError],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("x")
    changed(trained, tmp_path / "role", role="training_adapter")
    changed(trained, tmp_path / "base", model_hash="0" * 64, model="other")
    wrong = {name: given["model"] if value == "MODEL" else value for name, value in wrong.items()}
    with pytest.raises(error, match=told) as refused:
        libreflux.probe_few_steps(**{**given, "adapters": trained, "out": tmp_path / "out", **wrong})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "seen").exists()


def test_an_adapter_of_other_weights_is_checked_where_the_distilled_model_is_named(
    given: dict[str, Any], trained: Path, curve: FewStepsResult, tmp_path: Path
) -> None:
    other = changed(trained, tmp_path / "other.safetensors", model_hash="0" * 64, model="other")
    result = shutil.copytree(curve.folder, tmp_path / "out")
    found = libreflux.probe_few_steps(**given, adapters=other, against=given["model"], out=result, broken=trained)
    assert found.points[0].kept[0].text == "0 % [0, 0]"
    assert found.remark == ""


def test_the_command_prints_it_and_refuses_what_has_no_effect(
    run: Callable[..., Any], given: dict[str, Any], trained: Path, curve: FewStepsResult
) -> None:
    shared = ["probe", given["model"], "--data", given["data"], "--judge", given["judge"], "--resolution", 32]
    command = [*shared, "--adapter", trained.parent, "--prompts", given["prompts"], "--out", curve.folder]
    done = run(*command, "--few-steps")
    assert done.code == 0, done.err
    assert done.out.startswith(curve.stop)
    assert "0 sets of pictures drawn now" in done.out
    assert json.loads(run(*command, "--few-steps", "--json").out) == json.loads(curve.file.read_text())
    for words, told in (
        (["--few-steps", "--ocr"], "--ocr: has no effect beside --few-steps"),
        (["--few-steps", "--steps", "2,4"], "--steps: takes one number beside --few-steps"),
        (["--keep", 0.5], "--keep: belongs to --few-steps"),
        ([], "--prompts: cannot be"),
    ):
        refused = run(*command, *words)
        assert (refused.code, told in refused.err) == (2, True)
