"""Going on under a changed recipe: only when asked, remembered, killed at the worst moment, with fitting tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from libreflux.data.held_out import places
from libreflux.data.order import step_plan
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import RunError
from libreflux.files import sha256_file
from libreflux.recipe import Recipe
from libreflux.training import checkpoint
from libreflux.training.callbacks import Callbacks, StepInfo
from libreflux.training.loop import fit

Tree = Callable[..., dict[str, Any]]
SIGKILL = -9


class Listener(Callbacks):
    def __init__(self) -> None:
        self.steps: list[StepInfo] = []

    def on_step(self, info: StepInfo) -> None:
        self.steps.append(info)


def run(tree: dict[str, Any], *, fork: bool = False) -> list[StepInfo]:
    heard = Listener()
    fit(Recipe.model_validate(tree), heard, fork=fork)
    return heard.steps


def remembered(folder: Path) -> list[dict[str, Any]]:
    forks: list[dict[str, Any]] = json.loads((folder / checkpoint.RECIPE).read_text())["forks"]
    return forks


def test_a_changed_recipe_goes_on_only_with_fork_and_is_remembered(recipe_tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe_tree(out, steps=2))
    before = (out / checkpoint.RECIPE).read_bytes()
    source = recipe_tree(out)["data"][0]
    optimizer = {"kind": "adamw", "learning_rate": 5e-4}
    tree = recipe_tree(out, steps=4, batch=1, base="bf16", optimizer=optimizer, data=[{**source, "prefix": "b "}])
    with pytest.raises(RunError, match=r"data\.0\.prefix .*batch \(2 -> 1\).*0\.0005\); hint: .*`fork`"):
        run(tree)
    assert (out / checkpoint.RECIPE).read_bytes() == before
    steps = run(tree, fork=True)

    samples = prepare_recipe(Recipe.model_validate(tree))[0].samples
    plans = [step_plan(0, step, samples, 1, 1, 1) for step in (2, 3)]
    assert [info.step for info in steps] == [3, 4]
    assert [info.epoch for info in steps] == [unit.epoch for [unit] in plans]
    assert [info.learning_rate for info in steps] == [5e-4, 5e-4]
    [entry] = remembered(out)
    assert entry["step"] == 2
    assert entry["changed"] == {
        "base": ["fp32", "bf16"],
        "data.0.prefix": ["", "b "],
        "batch": [2, 1],
        "optimizer.learning_rate": [1e-3, 5e-4],
    }
    states = {one.step: one.state()["data_hash"] for one in checkpoint.listed(out)}
    assert states[2] != states[4] == entry["data_hash"]

    assert [info.step for info in run(tree | {"steps": 5})] == [5]  # the fork is this run's recipe from now on
    with pytest.raises(RunError, match="step 5, the last, is done already: nothing is left to fork"):
        run(tree | {"steps": 5, "batch": 2}, fork=True)
    assert run(tree | {"steps": 6}, fork=True)[0].step == 6  # nothing has changed: no second fork
    assert len(remembered(out)) == 1
    with pytest.raises(RunError, match="the pictures it adds have been trained on"):
        run(tree | {"steps": 7, "held_out": {"share": 0.5}}, fork=True)


def test_a_fork_that_is_killed_before_its_first_checkpoint_goes_on_without_the_option(
    recipe_tree: Tree, tmp_path: Path, fork_runs: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    plan: list[dict[str, Any]] = []
    for name in ("whole", "killed"):
        old = recipe_tree(tmp_path / name, steps=2, samples={"every": 1, "prompts": ["a fox"]})
        new = {**old, "steps": 6, "batch": 3, "data": [{**old["data"][0], "prefix": "b "}], "save": {"every": 2}}
        plan.append({"recipe": old, "moment": None})
        if name == "killed":
            claim = {"event": "os.rename", "match": r"recipe\.json\.tmp-\w+$", "nth": 1}
            plan += [
                {"recipe": new, "moment": claim, "fork": True},  # before it is remembered
                {"recipe": new, "moment": None},  # so nothing has changed but the recipe: refused
                {"recipe": new, "moment": {"backward": 4}, "fork": True},
                {"recipe": new, "moment": None},
            ]
        else:
            plan.append({"recipe": new, "moment": None, "fork": True})
    results = fork_runs(plan)
    assert [result["code"] for result in results] == [0, 0, 0, SIGKILL, 2, SIGKILL, 0]
    assert "`fork`" in results[4]["errors"][0]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert [one["step"] for one in remembered(killed)] == [2]
    assert remembered(killed) == remembered(whole)
    names = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(names) > 6
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"adapter": {"targets": [{"layers": "**", "factor": 8}]}}, r"adapter\.targets\.0\.factor \(4 -> 8\)"),
        ({"optimizer": {"kind": "adamw_bf16", "learning_rate": 1e-3}}, r"optimizer\.kind"),
    ],
)
def test_what_the_checkpoints_tensors_settle_cannot_fork(
    recipe_tree: Tree, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(recipe_tree(tmp_path / "run", steps=1))
    with pytest.raises(RunError, match=rf"{named}.*hint: restore .*or choose another `out`") as refusal:
        run(recipe_tree(tmp_path / "run", steps=2, batch=1, **change), fork=True)
    assert "`fork`" not in str(refusal.value)


def test_data_may_change_under_a_fork_and_the_base_may_not(
    recipe_tree: Tree, tmp_path: Path, pictures_dir: Path
) -> None:
    from tiny import make_tiny_model, tiny_transformer

    folder, model = tmp_path / "pictures", make_tiny_model(tmp_path / "model")
    folder.mkdir()
    for path in pictures_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tree = recipe_tree(tmp_path / "run", model=str(model), data=[{"path": str(folder)}], steps=2)
    run(tree)
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(RunError, match=r"pictures, captions or encoders have changed.*`fork`"):
        run(tree | {"steps": 3})
    assert [info.step for info in run(tree | {"steps": 3}, fork=True)] == [3]
    assert [(one["step"], one["changed"]) for one in remembered(tmp_path / "run")] == [(2, {})]
    tiny_transformer(seed=1).save_pretrained(model / "transformer")
    with pytest.raises(RunError, match="weights of the base model have changed"):
        run(tree | {"steps": 4}, fork=True)


def test_a_fork_whose_checkpoints_are_lost_starts_again_from_the_one_before(recipe_tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe_tree(out, steps=2, save={"every": 1, "keep": 9}))
    forked = recipe_tree(out, steps=4, batch=1, save={"every": 1, "keep": 9})
    run(forked, fork=True)
    for step in (2, 3, 4):
        (checkpoint.step_folder(out, step) / checkpoint.OPTIMIZER).write_bytes(b"gone")
    assert [info.step for info in run(forked)] == [2, 3, 4]
    assert [one["step"] for one in remembered(out)] == [1]


def pictures_in(folder: Path, paths: Iterable[Path]) -> str:
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder / f"{folder.name}-{path.name}")
        shutil.copy(path.with_suffix(".txt"), folder / f"{folder.name}-{path.stem}.txt")
    return str(folder)


def test_a_picture_that_was_trained_on_before_a_fork_cannot_be_held_out_after_it(
    recipe_tree: Tree, tmp_path: Path, pictures_dir: Path
) -> None:
    all_five = sorted(pictures_dir.glob("*.png"))
    kept, dropped = (pictures_in(tmp_path / name, part) for name, part in (("k", all_five[:2]), ("d", all_five[2:4])))
    copies, others = (pictures_in(tmp_path / name, part) for name, part in (("c", all_five[3:]), ("o", all_five[4:])))
    tree = recipe_tree(tmp_path / "run", steps=2, data=[{"path": dropped}, {"path": kept}])
    run(tree)
    fewer = {**tree, "steps": 3, "data": [{"path": kept}]}
    refused = r"was trained on before the fork at step 2, as .*/d/d-\d\.png; hint: hold out other pictures"
    for apart in (dropped, copies):
        with pytest.raises(RunError, match=rf"^{apart}/.*\.png: {refused}"):
            run({**fewer, "held_out": {"path": apart}}, fork=True)
    assert run({**fewer, "held_out": {"path": others}}, fork=True)[-1].step == 3
    for changes in ({"steps": 4}, {"steps": 4, "batch": 1}):  # without a fork, and by a second one
        with pytest.raises(RunError, match=refused):
            run({**fewer, **changes, "held_out": {"path": dropped}}, fork="batch" in changes)
    for path in (tmp_path / "cache").glob("files.sqlite3*"):
        path.unlink()
    with pytest.raises(RunError, match=refused):  # where nothing remembers contents the path tells
        run({**fewer, "steps": 4, "held_out": {"path": dropped}})


def test_what_a_share_held_out_may_be_moved_to_a_folder_of_its_own_and_no_other_picture(
    recipe_tree: Tree, tmp_path: Path, pictures_dir: Path, share: float
) -> None:
    everyone = pictures_in(tmp_path / "all", pictures_dir.glob("*.png"))
    tree = recipe_tree(tmp_path / "run", steps=2, data=[{"path": everyone}], held_out={"share": share})
    run(tree)
    order = sorted(Path(everyone).glob("*.png"), key=lambda path: places([sha256_file(path)[:32]])[0])
    for name, path in (("apart", order[0]), ("trained", order[1])):
        (tmp_path / name).mkdir()
        for file in (path, path.with_suffix(".txt")):
            file.rename(tmp_path / name / file.name)
    forked = {**tree, "steps": 3}
    with pytest.raises(RunError, match=r"trained/.*\.png: was trained on before the fork at step 2"):
        run({**forked, "held_out": {"path": str(tmp_path / "trained")}}, fork=True)
    assert run({**forked, "held_out": {"path": str(tmp_path / "apart")}}, fork=True)[-1].step == 3


def test_another_path_or_machine_is_no_change(
    recipe_tree: Tree,
    tmp_path: Path,
    pictures_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from tiny import make_tiny_model

    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures_dir, "photos")
    make_tiny_model(Path("model"))
    names = ("undisturbed", "run")
    first = {name: recipe_tree(Path(name), steps=2, model="model", data=[{"path": "photos"}]) for name in names}
    run({**first["undisturbed"], "steps": 3})
    run(first["run"])
    changes: list[dict[str, Any]] = [{"data": [{"path": "./photos"}]}, {"threads": 2, "text_cache": "none"}]
    for step, change in enumerate(changes, 3):
        caplog.clear()
        tree = {**first["run"], "steps": step, **change}
        assert [info.step for info in run(tree)] == [step]
        told = [record.message.partition(" instead")[0] for record in caplog.records if "last bits" in record.message]
        assert told == (["resumed with threads 2", "resumed with text_cache none"] if step == 4 else [])
    folder = Path("run", "checkpoints", "step-00000003")
    assert (folder / "adapter.safetensors").read_bytes() == Path("undisturbed/adapter.safetensors").read_bytes()

    Path("photos").rename("moved")
    Path("model").rename("base")
    tree = {**first["run"], "model": "base", "data": [{"path": str(tmp_path / "moved")}]}
    assert [info.step for info in run({**tree, "steps": 5, "gradient_checkpointing": True})] == [5]
    assert "gradient_checkpointing True instead of False" in caplog.text
    assert remembered(tmp_path / "run") == []
    caplog.clear()
    elsewhere = {**tree, "data": [{"path": pictures_in(tmp_path / "other", sorted(pictures_dir.glob("*.png"))[:4])}]}
    with pytest.raises(RunError, match=r"all 5 steps are done, and its pictures, captions or encoders have changed"):
        run({**elsewhere, "steps": 5})
    with pytest.raises(RunError, match=r"pictures, captions or encoders have changed .*: data\.0\.path .*`fork`"):
        run({**elsewhere, "steps": 6})
    run({**elsewhere, "steps": 6}, fork=True)
    [entry] = remembered(tmp_path / "run")
    assert entry["changed"] == {"data.0.path": [str(tmp_path / "moved"), str(tmp_path / "other")]}
