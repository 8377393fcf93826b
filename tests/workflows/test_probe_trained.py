"""A probe finds what a run, a cache or a folder has trained on among the pictures that it measures."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import libreflux
from libreflux.data import encode
from libreflux.data.held_out import places
from libreflux.data.prepare import prepare_cache
from libreflux.emoji import compose
from libreflux.errors import DataError
from libreflux.files import sha256_file
from libreflux.probing import run as probe_run
from libreflux.probing.context import ProbeContext
from libreflux.probing.results import Measure, read_result
from libreflux.probing.section import Section, SectionResult
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene
from libreflux.recipe import Recipe
from libreflux.training import run_recipe
from libreflux.workflows import probe_measure, probe_trained

NEW = 2
"""Pictures of `mixed` that nobody has trained on."""


@pytest.fixture(autouse=True)
def no_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the model itself here: no weights are loaded, and each section finds one number."""

    def stub(section: Section) -> Section:
        def measure(context: ProbeContext) -> SectionResult:
            return SectionResult(
                [Measure(name="x", at={}, subset="all", value=1.0, low=0.0, high=2.0, replicates=[1.0])]
            )

        return dataclasses.replace(section, measure=measure)

    for module in (probe_measure, encode):
        monkeypatch.setattr(module, "release", lambda device: None)
    monkeypatch.setattr(probe_run, "SECTIONS", tuple(map(stub, probe_run.SECTIONS[:1])))

    def context(model: Any, data: Any, *rest: Any) -> Any:
        transformer = SimpleNamespace(device=torch.device("cpu"))
        return SimpleNamespace(transformer=transformer, settings=data.settings, has_drawn=lambda wanted: False)

    monkeypatch.setattr(probe_measure, "open_context", context)


@pytest.fixture(scope="module")
def mixed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the trained run's pictures one copied and one saved anew, and two that are new; read it only."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    compose.write_folder(folder, NEW, 77)
    (folder / "metadata.jsonl").unlink()
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"something new {path.stem}")
    first, second = sorted(pictures.glob("*.png"))[:2]
    shutil.copy(first, folder / "copied.png")
    with Image.open(second) as picture:
        picture.save(folder / "saved.png", compress_level=0)
    for name in ("copied", "saved"):
        (folder / f"{name}.txt").write_text(f"{name} from the training")
    return folder


@pytest.fixture
def measure(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def call(data: Path, **options: Any) -> Any:
        given = {"quick": True, "prompts": 2, "guidance": [1], "steps": [1, 2], "resolution": 32, **options}
        return libreflux.probe(str(tiny_model_dir), data=data, **{"out": tmp_path / "out", **given})

    return call


def seen_by_name(found: Any) -> dict[str, str | None]:
    return {row.name: row.seen for row in found.result.trained.rows}


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


def claimed(run: Path, model: Path, photos: Path, **changed: Any) -> Recipe:
    """A run folder with its recipe and its cache, as training leaves them."""
    tree = {"model": str(model), "data": [{"path": str(photos)}], "resolution": [32], "steps": 1, "out": str(run)}
    recipe = Recipe.model_validate(tree | changed)
    run.mkdir()
    run_recipe.claim(run, recipe)
    prepare_cache(recipe)
    return recipe


def write_photos(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir()
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return folder


def test_what_a_run_held_out_was_not_trained_on(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    spots = {path.name: float(places([sha256_file(path)[:32]])[0]) for path in photos.glob("*.png")}
    share = sorted(spots.values())[2]  # two are below
    claimed(tmp_path / "run", tiny_model_dir, photos, held_out={"share": share})
    found = measure(photos, trained_on=tmp_path / "run")
    assert seen_by_name(found) == {name: None if spot < share else "file" for name, spot in spots.items()}
    apart = write_photos(tmp_path / "apart", 3, first=10)
    claimed(tmp_path / "second", tiny_model_dir, photos, held_out={"path": str(apart)})
    found = measure(apart, trained_on=tmp_path / "second")
    assert found.result.trained.verdict == f"none of 3 pictures is in {tmp_path / 'second'} (6 pictures)"
    assert found.result.trained.as_json()["held_out"] is True
    assert "Were the pictures held out?" in found.page.read_text("utf-8")


def test_pictures_whose_files_are_gone_are_known_by_their_digest(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    measured = shutil.copytree(photos, tmp_path / "measured")
    write_photos(tmp_path / "new", 1, first=20)
    for path in (tmp_path / "new").iterdir():
        shutil.copy(path, measured)
    claimed(tmp_path / "run", tiny_model_dir, photos)
    shutil.rmtree(photos)
    found = measure(measured, trained_on=tmp_path / "run" / "cache")
    assert seen_by_name(found) == {"0.png": "file", "1.png": "file", "2.png": "file", "20.png": None}
    new = next(row for row in found.result.trained.rows if row.name == "20.png")
    assert new.content is not None
    assert new.content.distance > 0


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
