"""Checkpoints are complete or absent, found by step, pruned by rule; a changed recipe is named key by key."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from libreflux import files
from libreflux.errors import RunError
from libreflux.recipe import Recipe
from libreflux.training import checkpoint


def _write(run: Path, step: int, value: float = 1.0) -> checkpoint.Checkpoint:
    writers = {
        name: partial(save_file, {"w": torch.full((3,), value)}) for name in (checkpoint.ADAPTER, checkpoint.OPTIMIZER)
    }
    return checkpoint.write(run, step, writers, {"note": "n"})


def test_latest_is_the_highest_step_not_the_last_name_or_date(tmp_path: Path) -> None:
    for step in (1000, 123456789, 999, 20):  # written in this order; as names 123456789 sorts before 00000999
        _write(tmp_path, step)
    assert [c.step for c in checkpoint.listed(tmp_path)] == [20, 999, 1000, 123456789]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 123456789
    assert newest.state() == {"schema": 1, "step": 123456789, "note": "n"}


def test_no_run_folder_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.recover(tmp_path / "nowhere") is None


def test_a_failing_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    _write(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 2, {checkpoint.ADAPTER: fails}, {})
    assert [c.step for c in checkpoint.listed(tmp_path)] == [1]
    checkpoint.recover(tmp_path)
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_put_aside(tmp_path: Path, damage: str) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    target = _write(tmp_path, 3)
    if damage == "flip":
        raw = bytearray(target.adapter.read_bytes())
        raw[-1] ^= 1
        target.adapter.write_bytes(raw)
    elif damage == "cut":
        target.adapter.write_bytes(target.adapter.read_bytes()[:-1])
    elif damage == "missing":
        target.optimizer.unlink()
    else:
        (target.path / "manifest.json").unlink()
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 2
    again = checkpoint.recover(tmp_path)
    assert again == newest
    assert [c.step for c in checkpoint.listed(tmp_path)] == [1, 2]
    _write(tmp_path, 3)  # the resumed run can write its own
    last = checkpoint.latest(tmp_path)
    assert last is not None
    assert last.step == 3


def test_checkpoints_that_a_live_run_deletes_while_they_are_read_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        _write(tmp_path, step)
    verify = files.verify_manifest

    def read_while_the_run_goes_on(folder: Path) -> None:
        if folder.name.endswith("2"):
            _write(tmp_path, 3)
            assert checkpoint.prune(tmp_path, 1, None) == [1, 2]
        verify(folder)

    monkeypatch.setattr(files, "verify_manifest", read_while_the_run_goes_on)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert not caplog.text


def test_recover_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    folders = [tmp_path / name for name in (checkpoint.FOLDER, "averages", "samples")]
    for folder in folders:
        for name in (".step-00000002.staging-0b6424b5", ".deleted-step-00000000"):
            (folder / name).mkdir(parents=True)
            (folder / name / checkpoint.ADAPTER).write_bytes(b"half")
        (folder / ".step-00000002.png.tmp-0b6424b5").write_bytes(b"half")
        (folder / "notes").mkdir()  # the user's own stay
        (folder / ".mine").mkdir()
    (tmp_path / f".{checkpoint.ADAPTER}.tmp-0b6424b5").write_bytes(b"half")
    (tmp_path / ".tmpK3xYz0").write_bytes(b"half, by safetensors")
    (tmp_path / ".mine").write_bytes(b"")
    checkpoint.recover(tmp_path)
    for folder in folders:
        assert {path.name for path in folder.iterdir()} - {"step-00000001"} == {"notes", ".mine"}
    assert {path.name for path in tmp_path.iterdir()} == {".mine", *(folder.name for folder in folders)}


def test_every_damage_to_every_file_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut at several lengths, 40 single bits flipped in each: the previous checkpoint is used, the file named."""
    _write(tmp_path, 1)
    target = _write(tmp_path, 2).path
    random = np.random.default_rng(0)
    names = sorted(path.name for path in target.iterdir())
    assert names == [checkpoint.ADAPTER, "manifest.json", checkpoint.OPTIMIZER, checkpoint.STATE]
    for name in names:
        path, whole = target / name, (target / name).read_bytes()
        damaged = [whole[:length] for length in (0, 1, 8, len(whole) // 2, len(whole) - 1)]
        for bit in random.choice(8 * len(whole), 40, replace=False).tolist():
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.append(bytes(flipped))
        for number, contents in enumerate(damaged):
            path.write_bytes(contents)
            caplog.clear()
            newest = checkpoint.latest(tmp_path)
            assert newest is not None, (name, number)
            assert newest.step == 1, (name, number)
            assert "step-00000002 is not used: " in caplog.text
            assert str(target) in caplog.text
            assert name in caplog.text or name == "manifest.json"  # a name in the manifest may be the damaged one
        path.write_bytes(whole)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 2


@given(
    steps=st.sets(st.integers(1, 60), max_size=20),
    keep=st.integers(1, 5),
    every=st.one_of(st.none(), st.integers(0, 12)),
)
def test_pruning_keeps_the_newest_and_the_multiples(steps: set[int], keep: int, every: int | None) -> None:
    doomed = set(checkpoint.doomed(steps, keep, every))
    kept = steps - doomed
    newest = set(sorted(steps)[-keep:])
    assert newest <= kept
    assert kept == newest | {step for step in steps if every and step % every == 0}


def test_pruning_a_rolling_run_equals_pruning_once(tmp_path: Path) -> None:
    for step in range(1, 13):
        _write(tmp_path, step)
        checkpoint.prune(tmp_path, keep=2, keep_every=5)
    assert [c.step for c in checkpoint.listed(tmp_path)] == [5, 10, 11, 12]
    assert not [path for path in (tmp_path / checkpoint.FOLDER).iterdir() if path.name.startswith(".")]


def _recipe(**changes: object) -> Recipe:
    base = {"data": [{"path": "photos"}], "resolution": 32, "steps": 10, "out": "runs/a"}
    return Recipe.model_validate({**base, **changes})


def _begun(run: Path, **changes: object) -> None:
    checkpoint.claim(run, _recipe(**changes))
    _write(run, 1)


def test_the_same_recipe_resumes(tmp_path: Path) -> None:
    _begun(tmp_path)
    checkpoint.check_recipe(tmp_path, _recipe())


def test_a_changed_recipe_is_refused_by_key_with_both_values(tmp_path: Path) -> None:
    _begun(tmp_path, optimizer={"learning_rate": 1e-4})
    with pytest.raises(RunError) as refusal:
        checkpoint.check_recipe(tmp_path, _recipe(optimizer={"learning_rate": 2e-4}, data=[{"path": "scans"}]))
    line = str(refusal.value)
    assert "optimizer.learning_rate (0.0001 -> 0.0002)" in line
    assert "data.0.path ('photos' -> 'scans')" in line
    assert "betas" not in line
    assert "hint:" in line


def test_a_source_that_is_added_is_a_change(tmp_path: Path) -> None:
    _begun(tmp_path)
    with pytest.raises(RunError, match=r"data\.1\.path \(none -> 'scans'\)"):
        checkpoint.check_recipe(tmp_path, _recipe(data=[{"path": "photos"}, {"path": "scans"}]))


def test_what_trains_no_number_may_change(tmp_path: Path) -> None:
    _begun(tmp_path)
    checkpoint.check_recipe(tmp_path, _recipe(save={"every": 2}, out="elsewhere", steps=20))


def test_another_spelling_of_a_path_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = {"init_from": "a.safetensors"}
    _begun(tmp_path, adapter=adapter, model="base", data=[{"path": "photos"}])
    places = {"model": f"{tmp_path}/base", "data": [{"path": "./photos/"}]}
    checkpoint.check_recipe(tmp_path, _recipe(adapter={"init_from": "./a.safetensors"}, **places))
    with pytest.raises(RunError, match=r"adapter\.init_from \('a\.safetensors' -> 'b\.safetensors'\)"):
        checkpoint.check_recipe(tmp_path, _recipe(adapter={"init_from": "b.safetensors"}, **places))


def test_steps_may_not_change_under_a_schedule_that_reads_them(tmp_path: Path) -> None:
    cosine = {"schedule": "cosine"}
    _begun(tmp_path, optimizer=cosine)
    with pytest.raises(RunError, match=r"steps \(10 -> 20\)"):
        checkpoint.check_recipe(tmp_path, _recipe(optimizer=cosine, steps=20))


def test_a_run_that_saved_nothing_may_change_its_mind(tmp_path: Path) -> None:
    checkpoint.claim(tmp_path, _recipe(batch=1))
    checkpoint.check_recipe(tmp_path, _recipe(batch=2))
    (tmp_path / checkpoint.ADAPTER).write_bytes(b"a result whose checkpoints were deleted")
    with pytest.raises(RunError, match=r"batch \(1 -> 2\)"):
        checkpoint.check_recipe(tmp_path, _recipe(batch=2))


def test_a_torn_recipe_file_is_refused(tmp_path: Path) -> None:
    _begun(tmp_path)
    (tmp_path / checkpoint.RECIPE).write_text('{"schema": 1, "mod')
    with pytest.raises(RunError, match="cannot be read as a recipe"):
        checkpoint.check_recipe(tmp_path, _recipe())


def test_checkpoints_without_a_recipe_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    with pytest.raises(RunError, match=r"no recipe\.json"):
        checkpoint.check_recipe(tmp_path, _recipe())


def test_metrics_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.METRICS
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    checkpoint.rewind(tmp_path / checkpoint.METRICS, 2)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n'


def test_a_record_takes_the_place_of_its_step_and_of_later_ones(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.HELD_OUT
    for step, value in ((0, 0.9), (2, 0.8), (4, 0.7), (2, 0.6)):
        checkpoint.record(path, {"step": step, "loss": value})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 0.9},
        {"step": 2, "loss": 0.6},
    ]


def test_publish_copies_the_bytes(tmp_path: Path) -> None:
    done = _write(tmp_path, 7, value=0.5)
    assert checkpoint.publish(tmp_path, done).read_bytes() == done.adapter.read_bytes()
    assert load_file(tmp_path / checkpoint.ADAPTER)["w"].tolist() == [0.5] * 3


def test_a_stored_recipe_that_todays_rules_refuse_is_told_with_its_key(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"data": [{"path": "a"}], "resolution": 32, "steps": 3, "out": str(tmp_path)})
    checkpoint.claim(tmp_path, recipe)
    (tmp_path / checkpoint.ADAPTER).touch()
    stored = json.loads((tmp_path / checkpoint.RECIPE).read_text())
    (tmp_path / checkpoint.RECIPE).write_text(json.dumps(stored | {"idle": 1}))
    with pytest.raises(RunError, match=r"recipe\.json: idle: written .*unknown key; hint: correct that key"):
        checkpoint.changes(tmp_path, recipe)
    (tmp_path / checkpoint.RECIPE).write_text(json.dumps(stored))
    assert checkpoint.changes(tmp_path, recipe) == {}
