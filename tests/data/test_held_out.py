"""Held-out pictures: who they are, and that no epoch ever shows one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from libreflux.data.batches import Batches
from libreflux.data.held_out import HeldOut, places
from libreflux.data.order import step_plan, steps_of_epoch
from libreflux.data.prepare import prepare_recipe
from libreflux.errors import DataError
from libreflux.files import sha256_file
from libreflux.recipe import Recipe

PICTURES = 16


def write_pictures(folder: Path, numbers: Iterable[int]) -> Path:
    """Noise pictures of several shapes, each with two captions."""
    folder.mkdir()
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 60 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"an apple\n{'a small green frog ' * (1 + number % 3)}")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("many") / "pictures", range(PICTURES))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def place_of(path: Path) -> float:
    return float(places([sha256_file(path)[:32]])[0])


def share_of(folder: Path, count: int) -> float:
    """The share that holds out `count` pictures of a folder."""
    return float(np.mean(sorted(map(place_of, folder.glob("*.png")))[count - 1 : count + 1]))


def prepared(model: Path, cache: Path, *folders: Path, **changed: Any) -> tuple[Batches, HeldOut | None]:
    tree = {
        "model": str(model),
        "data": [{"path": str(folder), "caption_dropout": 1.0} for folder in folders],
        "resolution": 32,
        "steps": 1,
        "cache": str(cache),
        "out": str(cache / "run"),
        **changed,
    }
    return prepare_recipe(Recipe.model_validate(tree))


def test_a_folder_without_a_usable_picture_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good" / "a.png")
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    held_out = {"path": str(tmp_path / "bad")}
    with pytest.raises(DataError, match="bad: no picture in it can be used"):
        prepared(tiny_model_dir, tmp_path / "cache", tmp_path / "good", held_out=held_out, max_quarantined=0.9)


def shown_ids(batches: Batches, epochs: int) -> set[str]:
    found: set[str] = set()
    steps = sum(steps_of_epoch(epoch, batches.samples, 1, 3, 2) for epoch in range(epochs))
    for step in range(steps):
        for unit in step_plan(0, step, batches.samples, 1, 3, 2):
            found.update(batches.batch(unit).sample_ids if unit.items else ())
    return found


def test_places_are_uniform_and_each_pictures_own() -> None:
    ids = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(5000)]
    found = places(ids)
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(places(ids[::-7]), found[::-7])


def test_no_epoch_shows_a_held_out_picture_in_any_view(tiny_model_dir: Path, cache: Path, many: Path) -> None:
    source = {"path": str(many), "crops_per_picture": 2, "repeats": 2, "caption_dropout": 0.1}
    batches, held_out = prepared(
        tiny_model_dir,
        cache,
        data=[source, {**source, "prefix": "also "}],
        resolution=[32, 48],
        crop=["square", "aspect"],
        held_out={"share": share_of(many, 3)},
    )
    assert held_out is not None
    assert len(held_out) == 3  # in both sources, measured once
    everyone = {sha256_file(path)[:32] for path in many.glob("*.png")}
    shown = shown_ids(batches, 2)
    assert not shown & set(held_out.sample_ids)
    assert shown | set(held_out.sample_ids) == everyone
    assert len(batches) == 2 * (PICTURES - 3) * 4


def test_training_is_what_it_is_without_those_files_and_nobody_else_moves(
    tiny_model_dir: Path, cache: Path, many: Path, tmp_path: Path
) -> None:
    share = share_of(many, 4)
    batches, held_out = prepared(tiny_model_dir, cache, many, held_out={"share": share})
    assert held_out is not None
    apart = [path for path in many.glob("*.png") if sha256_file(path)[:32] in held_out.sample_ids]
    fewer = write_pictures(tmp_path / "fewer", {*range(PICTURES)} - {int(path.stem) for path in apart})
    without, none = prepared(tiny_model_dir, cache, fewer)
    assert none is None
    assert without.fingerprint() == batches.fingerprint()
    with pytest.raises(DataError, match=r"held_out\.share: .* of 12 pictures holds out none"):
        prepared(tiny_model_dir, cache, fewer, held_out={"share": share})
    # Two of the four are back, under other names, in another folder: these are held out again, and no other.
    back = write_pictures(tmp_path / "back", [])
    for path in apart[:2]:
        shutil.copy(path, back / f"other-{path.name}")
        (back / f"other-{path.stem}.txt").write_text("an apple")
    with pytest.raises(DataError, match=r"back: held_out\.share .* leaves none of its pictures"):
        prepared(tiny_model_dir, cache, fewer, back, held_out={"share": share})
    another = next(fewer.glob("*.png"))
    shutil.copy(another, back)
    shutil.copy(another.with_suffix(".txt"), back)
    more, again = prepared(tiny_model_dir, cache, fewer, back, held_out={"share": share})
    assert again is not None
    assert set(again.sample_ids) == {sha256_file(path)[:32] for path in apart[:2]}
    assert len(more) == 12 + 1


def test_another_folder_is_held_out_unless_it_is_trained_on(
    tiny_model_dir: Path, cache: Path, many: Path, tmp_path: Path
) -> None:
    apart, same = tmp_path / "apart", tmp_path / "same"
    for folder, name in ((apart, "008.png"), (same, "003.png")):
        folder.mkdir()
        shutil.copy(many / name, folder / "x.png")
        (folder / "x.txt").write_text("a small green frog")
    trained = write_pictures(tmp_path / "trained", range(4))
    batches, held_out = prepared(tiny_model_dir, cache, trained, held_out={"path": str(apart)})
    assert held_out is not None
    assert held_out.sample_ids == (sha256_file(apart / "x.png")[:32],)
    assert len(batches) == 4
    assert not shown_ids(batches, 1) & set(held_out.sample_ids)
    [batch] = held_out.batches(8)
    assert batch.captions == ("a small green frog",)
    with pytest.raises(DataError, match=r"same/x\.png: the same picture as .*003\.png, which is trained on"):
        prepared(tiny_model_dir, cache, trained, held_out={"path": str(same)})


def test_batches_hold_every_picture_once_with_a_caption_and_fewer_are_the_first(
    tiny_model_dir: Path, cache: Path, many: Path
) -> None:
    wanted = {"share": share_of(many, 4)}
    _, all_of_them = prepared(tiny_model_dir, cache, many, crop="aspect", held_out=wanted)
    _, two = prepared(tiny_model_dir, cache, many, crop="aspect", seed=5, held_out={**wanted, "pictures": 2})
    assert all_of_them is not None
    assert two is not None
    assert two.sample_ids == all_of_them.sample_ids[:2]
    batches = list(all_of_them.batches(3))
    assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(all_of_them.sample_ids)
    assert all(caption for batch in batches for caption in batch.captions)  # although the recipe drops all of them
    captions = dict(pair for batch in batches for pair in zip(batch.sample_ids, batch.captions, strict=True))
    for batch in two.batches(1):  # another seed: the same crops and captions
        assert captions[batch.sample_ids[0]] == batch.captions[0]
