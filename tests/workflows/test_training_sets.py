"""A run has trained on what its cache has of its own data folders, and on what it began with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import libreflux
from libreflux.data.held_out import places
from libreflux.data.prepare import prepare_cache
from libreflux.files import sha256_file
from libreflux.recipe import Recipe
from libreflux.training import run_recipe
from probed import claimed, seen_by_name, write_photos


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
