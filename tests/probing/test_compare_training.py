"""Measured pictures beside those that were trained on: the nearest by pixels, features and latents, of real caches."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from caching import prepare
from libreflux.cli.tables import print_remarks
from libreflux.cli.terminal import SafeConsole
from libreflux.data.cache import Cache
from libreflux.data.cached_pictures import cached_ids, is_cache
from libreflux.data.crops import View, cut
from libreflux.data.pictures import load_rgb
from libreflux.files import sha256_file
from libreflux.probing import nearest_latents
from libreflux.probing.compare_training import Known, compare
from libreflux.probing.judges import Judge, Verdict
from libreflux.probing.nearest import Closest, cosine, mean_absolute, root_mean_square, thumbnail
from libreflux.probing.pairs import keep_pairs
from libreflux.probing.report.trained import distance_rows
from libreflux.probing.results import Result
from libreflux.probing.trained import Neighbour, PictureCheck, TrainingCheck
from libreflux.probing.training_pictures import MeasuredPicture, NearestScene, TrainingPicture, TrainingSet
from libreflux.recipe import DataSource

VIEW = View("centre", 32, 16)


def vector(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def smooth(seed: int) -> Image.Image:
    """A picture of a few large spots, 64 x 48."""
    pixels = np.random.default_rng(seed).integers(40, 200, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST)


def shifted(picture: Image.Image, by: int) -> Image.Image:
    return Image.fromarray((np.asarray(picture).astype(np.int16) + by).astype(np.uint8))


def write(folder: Path, name: str, picture: Image.Image, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / name, **settings)
    (folder / name).with_suffix(".txt").write_text(f"picture {name}")
    return folder / name


def training_picture(path: Path) -> TrainingPicture:
    return TrainingPicture(sha256_file(path)[:32], path)


def measured_picture(path: Path) -> MeasuredPicture:
    name = sha256_file(path)[:32]
    return MeasuredPicture(name, path, path.with_suffix(".txt").read_text(), cut(load_rgb(path), VIEW, 0, name))


class MeanColour(Judge):
    """A judge that sees the mean colour of a picture."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.questions, self.side = {}, 16

    def forward(self, pixels: Tensor) -> Verdict:
        assert pixels.shape[1:] == (3, 16, 16)
        assert pixels.abs().max() <= 1
        return Verdict({}, pixels.mean((2, 3)) + 1)


def test_thumbnails_are_means_and_distances_are_what_they_are_called() -> None:
    checked = np.indices((64, 64)).sum(0) % 2 * 255
    grey = thumbnail(np.repeat(checked[..., None], 3, axis=2).astype(np.uint8))
    assert grey.shape == (3072,)
    assert np.abs(grey - 127.5).max() <= 0.5
    ones = vector([[1, 0], [0, 2], [0, 0]])
    np.testing.assert_allclose(mean_absolute(ones, vector([1, 1])), [0.5, 1, 1])
    np.testing.assert_allclose(root_mean_square(ones, vector([1, 1])), [0.5**0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(cosine(ones, vector([0, 7])), [1, 0, 1])
    closest = Closest(ones, mean_absolute)
    assert np.isinf(closest.distances).all()
    for number, row in ((4, [1, 1]), (7, [0, 1]), (8, [np.nan, np.nan]), (9, [0, 1])):
        closest.offer(number, vector(row))
    assert closest.nearest.tolist() == [4, 7, 7]  # of equal ones the first
    assert closest.distances.tolist() == [0.5, 0.5, 0.5]


def test_a_file_its_pixels_and_its_nearest_are_found(tiny_model_dir: Path, tmp_path: Path) -> None:
    same = write(tmp_path / "trained", "same.png", smooth(1))
    other = write(tmp_path / "trained", "other.png", smooth(2))
    third = write(tmp_path / "trained", "third.png", smooth(3))
    gone = TrainingPicture("f" * 32, None)
    copy = tmp_path / "measured" / "copy.png"
    write(copy.parent, copy.name, smooth(1)).write_bytes(same.read_bytes())
    saved = write(copy.parent, "saved.png", smooth(2), compress_level=0)
    near = write(copy.parent, "near.png", shifted(smooth(3), 5))
    assert sha256_file(saved) != sha256_file(other)
    source = DataSource(path=str(copy.parent))
    cache, _ = prepare(str(tiny_model_dir), [source], views=[VIEW], text_padding="drop", out=tmp_path / "cache")
    known = Known([TrainingSet("photos", [*map(training_picture, (same, other, third)), gone])], ["x.safetensors"])
    measured = [measured_picture(path) for path in (copy, saved, near)]
    told: list[tuple[int, int]] = []
    found = compare(
        measured, known, view=VIEW, judge=MeanColour(), cache=cache, progress=lambda done, of: told.append((done, of))
    )
    check = found.check
    assert [row.seen for row in check.rows] == ["file", "pixels", None]
    near_by = [row.pixels for row in check.rows]
    assert [None if one is None else (one.name, round(one.distance, 3)) for one in near_by] == [
        ("copy.png", 0.0),  # its own file will do for one that was trained on
        ("other.png", 0.0),
        ("third.png", 5.0),
    ]
    assert [row.content.name if row.content else None for row in check.rows] == ["copy.png", "other.png", "third.png"]
    assert all(row.content is not None and abs(row.content.distance) < 1e-2 for row in check.rows)
    assert check.content == "judge"
    assert (check.sets[0].pictures, check.sets[0].compared) == (4, 3)
    assert told == [(4, 4)]
    assert check.seen == 2
    assert check.remark == check.verdict == "not held out: 2 of 3 pictures were trained on"
    assert check.as_json()["held_out"] is False
    assert TrainingCheck.from_json(check.as_json()) == check

    pairs = keep_pairs(tmp_path / "out", measured, found, VIEW)
    assert [(one.at["row"], one.at["what"]) for one in pairs][:3] == [(0, "measured"), (0, "pixels"), (0, "content")]
    assert len(pairs) == 9
    with Image.open(tmp_path / "out" / pairs[-2].file) as shown:  # of the last row the nearest by pixels
        np.testing.assert_array_equal(np.asarray(shown), cut(load_rgb(third), VIEW, 0, sha256_file(third)[:32]))


def test_without_a_judge_latents_of_one_vae_are_compared(tiny_model_dir: Path, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "trained", f"{number}.png", smooth(number))
    near = write(tmp_path / "measured", "near.png", shifted(smooth(2), 1))
    saved = write(tmp_path / "measured", "saved.png", smooth(1), compress_level=0)
    model, drop = str(tiny_model_dir), {"text_padding": "drop"}
    trained, sources = prepare(
        model,
        [DataSource(path=str(tmp_path / "trained"))],
        views=[View("square", 32, 16)],
        out=tmp_path / "one",
        latents="sample",
        **drop,
    )
    own, _ = prepare(model, [DataSource(path=str(tmp_path / "measured"))], views=[VIEW], out=tmp_path / "two", **drop)
    ids = {one.id for one in sources[0][1]}
    assert cached_ids(tmp_path / "one") == ids  # and not the standard deviations
    assert is_cache(tmp_path / "one")
    assert not is_cache(tmp_path / "trained")
    pictures = [TrainingPicture(name, None) for name in sorted(ids)]  # their files are gone
    [one] = [measured_picture(near)]
    known = Known([TrainingSet("run", pictures, tmp_path / "one")])
    check = compare([one], known, view=VIEW, judge=None, cache=own).check
    [row] = check.rows
    expected = {
        name: (trained.latents(name, "square-32-0-white") - own.latents(one.id, "square-32-0-white")) for name in ids
    }
    distances = {name: float(off.square().mean().sqrt()) for name, off in expected.items()}
    best = min(distances, key=distances.__getitem__)
    assert best == sha256_file(tmp_path / "trained" / "2.png")[:32]
    assert row.content is not None
    assert (row.content.name, row.content.id) == (best, best)
    assert row.content.distance == pytest.approx(distances[best], rel=1e-5)
    assert (check.content, row.pixels, row.seen, check.sets[0].compared) == ("latents", None, None, 0)
    assert check.verdict == "none of 1 picture is in run (3 pictures, 0 of them compared by pixels)"
    for judge in (None, MeanColour()):  # the file of what it was saved from is gone
        again = compare([measured_picture(saved)], known, view=VIEW, judge=judge, cache=own).check
        assert [row.seen for row in again.rows] == ["latents"]
        assert again.as_json()["held_out"] is False
    untold = Known(
        [TrainingSet("c", [dataclasses.replace(each, trained=False) for each in pictures], tmp_path / "one")]
    )
    in_cache = compare([measured_picture(saved)], untold, view=VIEW, judge=None, cache=own).check
    assert [row.seen for row in in_cache.rows] == ["cache"]
    own.settings["vae"] = "another"
    assert compare([one], known, view=VIEW, judge=None, cache=own).check.content is None


def test_the_nearest_latents_of_many_are_those_of_one_after_another() -> None:
    random = np.random.default_rng(0)
    own = random.normal(size=(5, 40_000)).astype(np.float32)
    block = np.concatenate([own[[3]], random.normal(size=(70, 40_000)), own[[1]] + 1e-4]).astype(np.float32)
    plain, quick = Closest(own, root_mean_square), Closest(own, root_mean_square)
    for number, one in enumerate(block):
        plain.offer(number, one)
    for start in (0, 64):
        nearest_latents._offer(quick, own, range(start, len(block)), block[start : start + 64])
    assert quick.nearest.tolist() == plain.nearest.tolist()
    assert (quick.nearest[3], quick.distances[3], quick.nearest[1]) == (0, 0, 71)
    np.testing.assert_array_equal(quick.distances, plain.distances)


def test_a_copy_that_was_saved_as_jpeg_is_not_called_held_out(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "trained", "a.png", smooth(1))
    copy = write(tmp_path / "measured", "a.jpg", smooth(1), quality=90)
    write(tmp_path / "measured", "b.png", smooth(2))
    data = DataSource(path=str(copy.parent))
    cache, _ = prepare(str(tiny_model_dir), [data], views=[VIEW], text_padding="drop", out=tmp_path / "cache")
    measured = [measured_picture(copy), measured_picture(copy.with_name("b.png"))]
    known = Known([TrainingSet("photos", [training_picture(source)])], find_scene=lambda one: None)
    check = compare(measured, known, view=VIEW, judge=None, cache=cache).check
    assert check.rows[0].pixels is not None
    assert 0 < check.rows[0].pixels.distance < 2
    assert (check.seen, check.near, check.held_out) == (0, 1, None)
    assert check.remark == "1 of 2 pictures has a training picture within 2 of 255"
    assert check.verdict.startswith("none of 2 pictures is in photos (1 picture)")
    assert check.verdict.endswith(check.remark)


def test_tables_say_the_verdict_where_nothing_was_found() -> None:
    rows = [PictureCheck(id=str(number), name="a.png", seen=None) for number in range(4)]
    check = TrainingCheck(rows=rows, sets=[], unknown=["x.safetensors"])
    told = "not known to be held out: what was trained on is not known (x.safetensors)"
    assert distance_rows(check) == [("held out", told)]
    model = {"name": "mine", "sha256": "", "adapters": []}
    result = Result(model=model, settings={}, measures=[], pictures=[], versions={}, seconds=0.0, trained=check)
    shown = io.StringIO()
    print_remarks([result, dataclasses.replace(result, trained=None)], SafeConsole(file=shown, width=40))
    assert shown.getvalue() == f"mine: {told}\n"


def test_a_family_that_knows_its_scenes_is_asked(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "measured", "a.png", smooth(1))
    write(tmp_path / "measured", "b.png", smooth(2))
    source = DataSource(path=str(path.parent))
    cache, _ = prepare(str(tiny_model_dir), [source], views=[VIEW], text_padding="drop", out=tmp_path / "cache")

    def find(picture: MeasuredPicture) -> NearestScene | None:
        if picture.path.name == "b.png":
            return None
        return NearestScene(f"scene of {picture.caption}", 0.25, seen=True, picture=smooth(7))

    measured = [measured_picture(path), measured_picture(path.with_name("b.png"))]
    found = compare(measured, Known([], find_scene=find), view=VIEW, judge=None, cache=cache)
    assert [row.seen for row in found.check.rows] == ["scene", None]
    assert found.check.rows[0].scene == Neighbour(name="scene of picture a.png", distance=0.25)
    assert found.check.distances("scene").tolist() == [0.25]
    assert found.check.remark == "not held out: 1 of 2 pictures was trained on"
    pairs = keep_pairs(tmp_path / "out", measured, found, VIEW)
    assert [one.at["what"] for one in pairs] == ["measured", "scene"]
    assert pairs[0].at["seen"] == "scene"


def test_a_damaged_shard_is_told_and_left_out(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data", "a.png", smooth(1))
    source = DataSource(path=str(tmp_path / "data"))
    cache, _ = prepare(str(tiny_model_dir), [source], views=[VIEW], text_padding="drop", out=tmp_path / "cache")
    assert isinstance(cache, Cache)
    [shard] = (tmp_path / "cache" / "shards").glob("latents-*")
    shard.write_bytes(b"none")
    assert cached_ids(tmp_path / "cache") == set()
    assert "its pictures are not known" in caplog.text
