"""Which pictures of a folder are read, set apart, left out or refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from data.captioned import by_name, listed, picture, read_folder, refusal
from libreflux import files
from libreflux.data.folders import walk
from libreflux.data.sources import read, read_source
from libreflux.errors import DataError
from libreflux.recipe import DataSource


def test_the_same_picture_twice_is_one_sample(tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png")
    first.with_suffix(".txt").write_text("one\n")
    shutil.copy(first, tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("two\none\n")
    [sample] = read_folder(tmp_path)
    assert sample.captions == ("one", "two")


def test_order_and_ids_follow_content_not_names(tmp_path: Path) -> None:
    for index in range(6):
        picture(tmp_path / "x" / f"{index}.png", index).with_suffix(".txt").write_text(f"{index}\n")
        picture(tmp_path / "y" / f"{9 - index}.png", index).with_suffix(".txt").write_text(f"{index}\n")
    x, y = read_folder(tmp_path / "x"), read_folder(tmp_path / "y")
    assert [(sample.id, sample.captions) for sample in x] == [(sample.id, sample.captions) for sample in y]


def test_what_is_not_read_is_refused_not_skipped(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "no picture in this folder" in refusal(tmp_path)
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("fine\n")
    (tmp_path / "b.heic").write_bytes(b"x")
    assert "b.heic: .heic pictures are not supported yet; hint: convert it" in refusal(tmp_path)
    (tmp_path / "b.heic").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv: not supported yet" in refusal(tmp_path)
    (tmp_path / "metadata.csv").unlink()


def test_unusable_pictures_are_set_apart_with_the_reason(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0, (40, 32)).with_suffix(".txt").write_text("fine\n")
    picture(tmp_path / "b.png", 1, (100, 20)).with_suffix(".txt").write_text("flat\n")
    (tmp_path / "c.png").write_text("<html>")
    (tmp_path / "c.txt").write_text("a page\n")
    samples, quarantined = read_source(DataSource(path=str(tmp_path), min_size=32))
    assert [(sample.path.name, sample.size) for sample in samples] == [("a.png", (40, 32))]
    assert [(bad.path.name, bad.reason) for bad in quarantined] == [
        ("b.png", "too small: 100 x 20 pixels, min_size is 32"),
        ("c.png", "unreadable picture (neither PNG, JPEG, WebP, GIF, BMP nor TIFF)"),
    ]
    assert quarantined[1].id == files.sha256_file(tmp_path / "c.png")[:32]


def test_parts_hold_every_picture_once(tmp_path: Path) -> None:
    for index in range(20):
        picture(tmp_path / "x" / f"{index}.png", index).with_suffix(".txt").write_text("x\n")
    source = DataSource(path=str(tmp_path))
    parts = [read_source(source, part=(number, 3))[0] for number in range(3)]
    assert all(len(part) > 1 for part in parts)
    assert sorted(sample.id for part in parts for sample in part) == [sample.id for sample in read_folder(tmp_path)]


def test_what_the_walk_cannot_enter_or_name_is_one_line(tmp_path: Path) -> None:
    elsewhere, photos = tmp_path / "elsewhere", tmp_path / "photos"
    elsewhere.mkdir()
    photos.mkdir()
    (photos / "linked").symlink_to(elsewhere)
    with pytest.raises(DataError, match="links to folders are not followed"):
        walk(photos)
    (photos / "linked").unlink()
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"caf\\udce9\.png.*no UTF-8"):
        walk(photos)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPEG", ".apng"])
def test_other_endings_of_formats_that_are_read(tmp_path: Path, suffix: str) -> None:
    data = picture(tmp_path / "x.jpg" if suffix != ".apng" else tmp_path / "x.png")
    data.rename(tmp_path / f"a{suffix}").with_suffix(".txt").write_text("a cat")
    assert list(by_name(tmp_path)) == [f"a{suffix}"]


OTHERS = [".svg", ".dng", ".ppm", ".CR2", ".heic", ".exr", ".tga", ".psd", ".ico"]


@pytest.mark.parametrize("suffix", OTHERS)
def test_pictures_of_other_formats_are_refused_unless_one_that_is_read_lies_beside(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "a.jpg").with_suffix(".txt").write_text("a cat")
    (tmp_path / f"b{suffix}").write_bytes(b"x")
    assert f"b{suffix}: {suffix.lower()} pictures are not supported yet; hint: convert it to PNG" in refusal(tmp_path)
    (tmp_path / f"b{suffix}").rename(tmp_path / f"a{suffix}")  # as cameras write them
    assert len(read_folder(tmp_path)) == 1
    assert f"same names: 1 {suffix.lower()} file, the first: a{suffix}" in caplog.text


def test_what_has_a_caption_and_is_no_picture_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.mp4", "c"):
        (tmp_path / name).write_bytes(picture(tmp_path / "a.png").read_bytes())
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    (tmp_path / "README.md").write_text("of nothing")
    found = read(DataSource(path=str(tmp_path)))
    assert [(one.suffix, one.count, one.beside) for one in found.folder.unread.values()] == [
        (".md", 1, 0),
        (".mp4", 1, 1),
        (".txt", 2, 0),
        ("", 1, 1),
    ]
    assert "same names: 1 .mp4 file, the" in caplog.text
    assert "same names: 1 file without a suffix, the" in caplog.text
    assert "README" not in caplog.text


def write_run(folder: Path) -> None:
    """What a run leaves: a recipe, metrics and sample sheets."""
    picture(folder / "samples" / "step-00000001.png", 7)
    (folder / "checkpoints").mkdir()
    (folder / "recipe.json").write_text("{}")
    (folder / "metrics.jsonl").touch()


@pytest.mark.parametrize("out", ["run", "10_cat/deep/run", "10_cat", "."])
def test_a_run_in_a_data_folder_is_left_out(tmp_path: Path, out: str) -> None:
    write_run(tmp_path / out)
    kept = picture(tmp_path / ("9_dog" if out == "10_cat" else "10_cat") / "a.png")
    found = read(DataSource(path=str(tmp_path), folder_captions=True))
    assert [sample.path for sample in found.samples] == [kept]
    folders = [tmp_path / name for name in ("checkpoints", "samples")] if out == "." else [tmp_path / out]
    assert found.folder.left_out == folders


def test_samples_that_were_captioned_to_be_trained_on_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "samples" / "step-00000001.txt").write_text("a sheet")
    assert len(read_folder(tmp_path / "run" / "samples")) == 1


def test_what_is_there_under_another_name_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "Photos" / "Caf\u00e9.JPG").with_suffix(".txt").write_text("a cat")
    assert f"no such folder; hint: write {tmp_path}/Photos if that is meant" in refusal(tmp_path / "photos")
    for wanted in ("caf\u00e9.jpg", "Cafe\u0301.JPG", "Caf\u00e9.png"):
        listed(tmp_path / "Photos", {"file_name": wanted, "text": "x"})
        assert "is missing; hint: write Caf\u00e9.JPG if that is meant" in refusal(tmp_path / "Photos")
    (tmp_path / "set.zip").write_bytes(b"PK")
    assert "this is a file, and data.path names a folder; hint: unpack it" in refusal(tmp_path / "set.zip")
