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
    assert found.result.trained.as_json()["complete"] is True
    assert found.result.trained.as_json()["held_out"] is None  # what the base was trained on is not known
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
    assert seen_by_name(found) == {"0.png": "cache", "1.png": "cache", "2.png": "cache", "20.png": None}
    assert found.result.trained.as_json()["held_out"] is None
    cache = tmp_path / "run" / "cache"
    told = f"3 of 4 pictures are in {cache}, and what was trained on of that is not known"
    assert found.result.remark == told
    assert measure(measured, trained_on=tmp_path / "run").result.trained.seen == 3
    new = next(row for row in found.result.trained.rows if row.name == "20.png")
    assert new.content is not None
    assert new.content.distance > 0


def test_of_a_shared_cache_a_run_has_trained_on_what_was_read_from_its_own_folders(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    cats, dogs = write_photos(tmp_path / "cats", 3), write_photos(tmp_path / "dogs", 3, first=10)
    shared = str(tmp_path / "shared")
    for folder in (cats, dogs):
        claimed(tmp_path / f"run-{folder.name}", tiny_model_dir, folder, cache=shared)
    assert set(seen_by_name(measure(cats, trained_on=tmp_path / "run-cats")).values()) == {"file"}
    assert set(seen_by_name(measure(dogs, trained_on=tmp_path / "run-cats")).values()) == {None}
    for path in dogs.iterdir():
        shutil.copy(path, cats / f"new-{path.name}")  # after the training
    added = measure(dogs, trained_on=tmp_path / "run-cats")
    assert set(seen_by_name(added).values()) == {None}
    assert added.result.trained.sets[0].pictures == 3


def test_paths_of_a_recipe_begin_where_its_run_began_and_small_pictures_are_left_out(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    trained = write_photos(tmp_path / "there" / "photos", 3)
    for path in write_photos(tmp_path / "there" / "photos" / "small", 2, first=30).glob("*.png"):
        with Image.open(path) as picture:
            picture.resize((33, 33)).save(path)
    other = write_photos(tmp_path / "here" / "photos", 3, first=10)
    monkeypatch.chdir(tmp_path / "there")
    sources = [{"path": "photos", "min_size": 35}]
    claimed(Path("run"), tiny_model_dir, Path("photos"), data=sources)
    (tmp_path / "there" / "run" / "cache").rename(tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "here")
    for kept in (False, True):  # without its cache, and with it
        if kept:
            shutil.move(tmp_path / "kept", tmp_path / "there" / "run" / "cache")
        assert set(seen_by_name(measure(other, trained_on=tmp_path / "there" / "run")).values()) == {None}
        found = measure(trained, trained_on=tmp_path / "there" / "run")
        expected = {f"{number}.png": "file" if number < 30 else None for number in (0, 1, 2, 30, 31)}
        assert seen_by_name(found) == expected
        assert found.result.trained.sets[0].whole is kept  # what a folder holds now is not all that it held
    shutil.move(tmp_path / "there", tmp_path / "elsewhere")  # with its pictures
    moved = measure(tmp_path / "elsewhere" / "photos", trained_on=tmp_path / "elsewhere" / "run").result.trained
    assert (moved.seen, moved.sets[0].compared) == (3, 3)
    trained = tmp_path / "elsewhere" / "photos"
    shutil.move(tmp_path / "elsewhere" / "run", tmp_path / "moved")
    assert measure(trained, trained_on=tmp_path / "moved").result.trained.seen == 3


def test_what_an_adapter_began_with_counts_and_what_was_merged_is_not_forgotten(
    measure: Callable[..., Any], tiny_model_dir: Path, mixed: Path, trained: Path, tmp_path: Path
) -> None:
    first, second = write_photos(tmp_path / "first", 3), write_photos(tmp_path / "second", 3, first=10)
    claimed(tmp_path / "run-first", tiny_model_dir, first)
    for name, start in (("known", tmp_path / "run-first"), ("unknown", tmp_path)):
        began = {"init_from": str(start / "adapter.safetensors")}
        claimed(tmp_path / name, tiny_model_dir, second, adapter=began)
    assert set(seen_by_name(measure(first, trained_on=tmp_path / "known")).values()) == {"file"}
    found = measure(first, trained_on=tmp_path / "unknown").result.trained
    assert list(found.unknown) == [f"adapter.safetensors, with which {tmp_path / 'unknown'} began"]

    merged = tmp_path / "merged"
    libreflux.merge(str(tiny_model_dir), adapters=[trained], out=merged)
    settings: dict[str, Any] = {"quick": True, "prompts": 2, "guidance": [1], "steps": [1, 2], "resolution": 32}
    alone = libreflux.probe(str(merged), data=mixed, out=tmp_path / "out", **settings).result.trained
    assert alone is not None
    assert list(alone.unknown) == ["adapter.safetensors (merged)"]
    settings |= {"trained_on": trained.parent, "out": tmp_path / "out"}
    named = libreflux.probe(str(merged), data=mixed, **settings).result.trained
    assert named is not None
    assert (named.seen, list(named.unknown)) == (2, [])


def test_what_keeps_the_base_as_it_was_has_not_been_learnt(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    photos, kept = write_photos(tmp_path / "photos", 3), write_photos(tmp_path / "kept", 3, first=10)
    data = [{"path": str(photos)}, {"path": str(kept), "regularisation": True}]
    claimed(tmp_path / "run", tiny_model_dir, photos, data=data)
    assert set(seen_by_name(measure(kept, trained_on=tmp_path / "run")).values()) == {None}
    assert set(seen_by_name(measure(photos, trained_on=tmp_path / "run")).values()) == {"file"}


def test_files_of_a_cache_in_parts_are_known_and_a_damaged_memory_of_a_run_stays(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    photos, resaved = write_photos(tmp_path / "photos", 6), tmp_path / "resaved"
    shutil.copytree(photos, resaved)
    for path in resaved.glob("*.png"):
        with Image.open(path) as picture:
            picture.save(path, compress_level=0)
    tree = {"model": str(tiny_model_dir), "data": [{"path": str(photos)}], "resolution": [32], "steps": 1}
    recipe = Recipe.model_validate(tree | {"out": str(tmp_path / "run"), "cache": str(tmp_path / "parted")})
    for part in range(2):
        prepare_cache(recipe, part=(part, 2))
    found = measure(resaved, trained_on=tmp_path / "parted")
    assert set(seen_by_name(found).values()) == {"cache"}
    assert found.result.trained.sets[0].compared == 6
    (tmp_path / "run").mkdir()
    run_recipe.claim(tmp_path / "run", recipe)
    assert set(seen_by_name(measure(resaved, trained_on=tmp_path / "run")).values()) == {"pixels"}

    claimed(tmp_path / "broken", tiny_model_dir, photos)
    memory = tmp_path / "broken" / "cache" / "files.sqlite3"
    memory.write_bytes(b"x" * 4000)
    told = measure(photos, trained_on=[tmp_path / "broken" / "cache"]).result.trained
    assert (told.cached, told.sets[0].compared) == (6, 6)
    assert memory.read_bytes() == b"x" * 4000


def test_damage_in_a_runs_cache_is_told_and_other_crops_are_compared_anew(
    measure: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, new = write_photos(tmp_path / "photos", 3), write_photos(tmp_path / "new", 2, first=10)
    recipe = claimed(tmp_path / "run", tiny_model_dir, photos, resolution=[64])
    assert measure(new, trained_on=tmp_path / "run").result.trained.content is None
    prepare_cache(recipe.model_copy(update={"resolution": [32, 64]}))
    whole = measure(new, trained_on=tmp_path / "run").result.trained
    assert (whole.content, whole.complete) == ("latents", True)
    cache = tmp_path / "run" / "cache"
    for shard in (cache / "shards").glob("latents-*"):
        data = bytearray(shard.read_bytes())
        data[-200:] = bytes(200)
        shard.write_bytes(data)
    shutil.rmtree(tmp_path / "out" / "sections")
    torn = measure(new, trained_on=tmp_path / "run").result.trained
    assert torn.as_json()["complete"] is False
    assert f"not all of {tmp_path / 'run'} is known" in torn.verdict
    assert "what cannot be read of it is not compared" in caplog.text
    assert not (tmp_path / "out" / "sections" / "trained.json").exists()  # it may be mended
    (cache / "index.sqlite3").write_bytes(b"x" * 4000)
    assert measure(new, trained_on=tmp_path / "run").result.trained.as_json()["complete"] is False


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
