"""A probe finds what a run, a cache or a folder has trained on among the pictures that it measures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libreflux.errors import DataError
from libreflux.probing.results import read_result
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene
from libreflux.workflows import probe_trained
from probed import seen_by_name, write_photos


def test_an_adapters_own_run_is_known_and_title_json_and_page_say_not_held_out(
    run: Callable[..., Any],
    measure: Callable[..., Any],
    mixed: Path,
    trained: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = measure(mixed, adapters=[trained])
    told = "not held out: 2 of 4 pictures were trained on"
    new = {path.name: None for path in mixed.glob("*.png")}
    assert seen_by_name(found) == {**new, "copied.png": "file", "saved.png": "pixels"}
    assert told in caplog.text
    rows = {row.name: row for row in found.result.trained.rows}
    for name, row in rows.items():
        assert row.pixels is not None
        assert row.content is not None  # latents, of the run's cache
        assert (row.pixels.distance == 0) == (name in ("copied.png", "saved.png"))
        assert (row.content.distance == 0) == (name in ("copied.png", "saved.png"))
    assert found.result.trained.content == "latents"
    assert found.result.trained.sets[0].pictures == 5

    stored = json.loads((tmp_path / "out" / "probe.json").read_text("utf-8"))["trained"]
    assert (stored["held_out"], stored["seen"], stored["pictures"], stored["verdict"]) == (False, 2, 4, told)
    assert read_result(tmp_path / "out").trained == found.result.trained
    page = found.page.read_text("utf-8")
    assert page.count(f"({told})") == 2  # title and heading
    assert "<b>Not held out.</b>" in page
    assert page.count("the very file was trained on") == page.count("these very pixels were trained on") == 1
    pairs = [one for one in found.result.pictures if one.purpose == "nearest"]
    assert len(pairs) == 4 * 3
    assert page.count("data:image/jpeg") == len(pairs)

    before = (tmp_path / "out" / "sections" / "trained.json").stat().st_mtime_ns
    words = ["--resolution", 32, "--prompts", 2, "--guidance", "1", "--steps", "1,2", "--quick", "--data", mixed]
    shown = run("probe", tiny_model_dir, "--adapter", trained, "--out", tmp_path / "out", *words)
    assert shown.code == 0, shown.err
    assert told in " ".join(shown.out.split())
    assert "measured pictures that were trained on" in shown.out
    assert "2 of 4" in shown.out
    assert (tmp_path / "out" / "sections" / "trained.json").stat().st_mtime_ns == before  # not compared again
    assert told in " ".join(
        run("probe", tiny_model_dir, "--adapter", trained, "--out", tmp_path / "out", *words, "--all").out.split()
    )


def test_where_nothing_is_known_nothing_is_said(measure: Callable[..., Any], mixed: Path, tmp_path: Path) -> None:
    found = measure(mixed)
    assert found.result.trained is None
    assert json.loads((tmp_path / "out" / "probe.json").read_text("utf-8"))["trained"] is None
    assert "held out" not in found.page.read_text("utf-8")


def test_a_folder_and_a_judge_tell_what_is_near(
    measure: Callable[..., Any], mixed: Path, pictures: Path, judge: Path
) -> None:
    found = measure(mixed, trained_on=pictures, judge=judge)
    assert found.result.trained.content == "judge"
    assert {name for name, seen in seen_by_name(found).items() if seen} == {"copied.png", "saved.png"}
    copied = next(row for row in found.result.trained.rows if row.name == "copied.png")
    assert abs(copied.content.distance) < 1e-5
    again = measure(mixed, trained_on=[pictures, mixed], judge=judge)
    assert set(seen_by_name(again).values()) == {"file"}
    assert again.result.remark == "not held out: 4 of 4 pictures were trained on"


def test_an_adapter_away_from_its_run_is_told_and_the_run_can_be_named(
    measure: Callable[..., Any], mixed: Path, trained: Path, tmp_path: Path
) -> None:
    moved = shutil.copy(trained, tmp_path / "moved.safetensors")
    found = measure(mixed, adapters=[moved])
    assert found.result.trained.as_json()["held_out"] is None
    assert list(found.result.trained.unknown) == ["moved.safetensors"]
    assert found.result.trained.verdict.startswith("not known to be held out")
    assert found.result.remark == ""
    named = measure(mixed, adapters=[moved], trained_on=trained.parent)
    assert named.result.trained.seen == 2
    assert not named.result.trained.unknown  # that run wrote this very file
    another = measure(mixed, adapters=[moved], trained_on=write_photos(tmp_path / "another", 2))
    assert list(another.result.trained.unknown) == ["moved.safetensors"]
    assert another.result.trained.verdict.endswith("; not known: moved.safetensors")
    (tmp_path / "link.safetensors").symlink_to(trained)
    assert probe_trained.run_of(tmp_path / "link.safetensors") == trained.parent


def test_a_familys_own_word_is_taken(
    measure: Callable[..., Any], mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[MeasuredPicture] = []

    def find(picture: MeasuredPicture) -> NearestScene:
        asked.append(picture)
        return NearestScene("a fox, small", 3.0, seen=picture.path.name == "copied.png")

    monkeypatch.setattr(probe_trained, "scene_finder", lambda model: find)
    found = measure(mixed)
    assert seen_by_name(found)["copied.png"] == "scene"
    assert found.result.remark == "not held out: 1 of 4 pictures was trained on"
    assert {one.path.name for one in asked} == {path.name for path in mixed.glob("*.png")}
    assert {one.caption for one in asked} == {path.read_text().strip() for path in mixed.glob("*.txt")}
    assert all(one.pixels.shape == (32, 32, 3) for one in asked)
    assert "its scene was trained on" in found.page.read_text("utf-8")


def test_of_several_models_each_is_said_for_itself(
    measure: Callable[..., Any], mixed: Path, trained: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    found = measure(mixed, adapters=[trained], against=str(tiny_model_dir))
    told = json.loads((tmp_path / "out" / "freedom.json").read_text("utf-8"))["held_out"]
    assert [row["held_out"] for row in told] == [False, None]
    page = found.page.read_text("utf-8")
    assert "adapter.safetensors: not held out: 2 of 4 pictures were trained on)" in page


def test_a_place_that_holds_no_pictures_is_one_line(measure: Callable[..., Any], mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, told in (("nowhere", "no such folder"), ("empty", "empty: no picture in it; hint: name a run, a cache")):
        with pytest.raises(DataError, match=told):
            measure(mixed, trained_on=tmp_path / name)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="is a file; hint: name a run, a cache, or a folder"):
        measure(mixed, trained_on=next(mixed.glob("*.png")))
