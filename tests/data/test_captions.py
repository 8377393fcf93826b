"""Captions: where they stand, how they are read, and which one a visit gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.captioned import by_name, listed, picture, read_folder, refusal
from libreflux import files
from libreflux.data.captions import CaptionChoice, caption_weights, check_weights
from libreflux.data.sources import Sample, read
from libreflux.errors import DataError
from libreflux.recipe import DataSource
from rights import bound_by_modes


def test_side_cars_give_a_caption_per_line(tmp_path: Path) -> None:
    for index, name in enumerate(["a.png", "b.JPG", "c.jpeg", "deep/d.webp"]):
        picture(tmp_path / name, index).with_suffix(".txt").write_text(
            f"\ufeff caption {name} \r\n\nsecond\u2028half\n", encoding="utf-8"
        )
    (tmp_path / "README.md").write_text("not a picture")
    picture(tmp_path / ".hidden" / "x.png")
    samples = by_name(tmp_path)
    assert set(samples) == {"a.png", "b.JPG", "c.jpeg", "d.webp"}
    for name, sample in samples.items():
        assert sample.captions == (f"caption {'deep/' if name == 'd.webp' else ''}{name}", "second\u2028half")
        assert sample.kinds == ("", "")
        assert sample.id == files.sha256_file(sample.path)[:32]


def test_metadata_gives_texts_lists_and_names(tmp_path: Path) -> None:
    for index, name in enumerate("abcde"):
        picture(tmp_path / f"{name}.png", index)
    picture(tmp_path / "deep" / "f.png", 5)
    listed(
        tmp_path,
        {"file_name": "a.png", "text": "one", "width": 40},
        {"file_name": "./b.png", "prompt": ["one", "two"]},
        {"file_name": "deep/../c.png", "captions": {"short": "one", "long": ["two", "three"]}},
        {"file_name": "d.png", "caption": "said twice", "text": "said twice"},
        {"file_name": "e.png", "text": "line\nbreak"},
    )
    listed(tmp_path / "deep", {"file_name": "f.png", "caption": "deep"})
    samples = by_name(tmp_path)
    assert samples["a.png"].captions == ("one",)
    assert samples["b.png"].captions == ("one", "two")
    assert samples["c.png"].captions == ("one", "two", "three")
    assert samples["c.png"].kinds == ("short", "long", "long")
    assert samples["d.png"].captions == ("said twice",)
    assert samples["e.png"].captions == ("line break",)
    assert samples["f.png"].captions == ("deep",)


def test_both_spellings_join_without_repeating(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("one\ntwo\n")
    listed(tmp_path, {"file_name": "a.png", "captions": {"short": "one"}})
    [sample] = read_folder(tmp_path)
    assert dict(zip(sample.captions, sample.kinds, strict=True)) == {"one": "short", "two": ""}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"file_name": "gone.png", "text": "x"}', "line 2: listed file 'gone.png' is missing; hint:"),
        ('{"file_name": "notes.md", "text": "x"}', "line 2: listed file 'notes.md' is no picture of a format"),
        ('{"file_name": ".hidden/b.png", "text": "x"}', ".hidden/b.png: listed in metadata.jsonl but not read"),
        ('{"text": "x"}', "line 2: no file_name in this line; hint:"),
        ("[1]", "line 2: no file_name in this line"),
        ('{"file_name": "a.png"', "line 2: not valid JSON"),
        ('{"file_name": "a.png", "text": "a fox \\ud83d"}', "line 2: not valid JSON (half a character in 'a fox "),
        ('{"file_name": "a.png", "text": {"\\ude00": "a"}}', "line 2: not valid JSON (half a character"),
        ('{"file_name": "\\ud83d.png", "text": "a"}', "line 2: not valid JSON (half a character"),
        ("[" * 100_000, "line 2: not valid JSON (nested too deeply"),
        ('{"file_name": "a.png", "label": 3}', "line 2: no caption in this line; hint: add one of text, texts, prompt"),
        ('{"file_name": "a.png", "text": ""}', "line 2: text: '' is no caption"),
        ('{"file_name": "a.png", "text": null}', "line 2: text: None is no caption"),
        ('{"file_name": "a.png", "captions": {"long": [3]}}', "line 2: captions.long: 3 is no caption"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, row: str, told: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / ".hidden" / "b.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "fine"}}\n{row}\n')
    assert told in refusal(tmp_path)


def test_a_picture_without_a_caption_is_named_with_the_mend(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("fine\n")
    bare = picture(tmp_path / "b.png", 1)
    assert refusal(tmp_path).startswith(f"{bare}: this picture has no caption; hint: write a .txt of the same name")
    bare.with_suffix(".txt").write_text(" \n")
    assert "b.txt: this caption file is empty" in refusal(tmp_path)
    bare.with_suffix(".txt").write_bytes(b"caf\xe9\n")
    assert "b.txt: cannot be read as UTF-8" in refusal(tmp_path)
    bare.with_suffix(".txt").chmod(0)
    with bound_by_modes():
        assert "b.txt: cannot be read (Permission denied); hint: make it readable" in refusal(tmp_path)


def test_every_usual_caption_column_is_read(tmp_path: Path) -> None:
    columns = ["text", "texts", "prompt", "prompts", "caption", "captions", "description"]
    for index, column in enumerate(columns):
        picture(tmp_path / f"{column}.png", index)
    listed(tmp_path, *({"file_name": f"{name}.png", name: [f"a {name}", "b"]} for name in columns))
    for name, sample in by_name(tmp_path).items():
        assert sample.captions == (f"a {name.removesuffix('.png')}", "b")


def test_kohya_folders_repeat_and_may_name_what_they_show(tmp_path: Path) -> None:
    for index, name in enumerate(["10_sks cat/a", "3_a_dog/deep/b", "2023_summer/c", "plain/12_d/d"]):
        picture(tmp_path / f"{name}.png", index).with_suffix(".txt").write_text(f"{name}\n")
    assert {name: sample.repeats for name, sample in by_name(tmp_path).items()} == {
        "a.png": 10,
        "b.png": 3,
        "c.png": 1,
        "d.png": 1,
    }
    [itself] = read_folder(tmp_path / "10_sks cat")
    assert itself.repeats == 10
    for path in tmp_path.rglob("[ab].txt"):
        path.unlink()
    assert "a.png: this picture has no caption" in refusal(tmp_path)
    named = {sample.path.name: sample for sample in read_folder(tmp_path, folder_captions=True)}
    assert named["a.png"].captions == ("sks cat",)
    assert named["b.png"].captions == ("a dog",)
    assert named["c.png"].captions == ("2023_summer/c",)


def test_a_prefix_stands_before_each_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("one\ntwo\n")
    [sample] = read_folder(tmp_path, prefix="sks, ")
    assert sample.captions == ("sks, one", "sks, two")


def sample(*captions: tuple[str, str]) -> Sample:
    return Sample("id", "a.png", tuple(text for text, _ in captions), tuple(kind for _, kind in captions))


def test_caption_weights_by_name_and_by_line() -> None:
    three = sample(("a", "short"), ("b", "long"), ("c", "long"))
    named = DataSource(path=".", captions={"short": 0.3, "long": 0.7})
    assert caption_weights(named, three) == pytest.approx([0.3, 0.35, 0.35])
    assert caption_weights(DataSource(path=".", captions=[1, 2]), three) == [1, 2, 0]
    assert caption_weights(DataSource(path="."), three) == [1, 1, 1]
    check_weights(named, [three])


def test_caption_weights_that_cannot_be_used_are_refused() -> None:
    named = DataSource(path="photos", captions={"short": 0.3, "logn": 0.7})
    with pytest.raises(DataError, match=r"photos: no caption is named 'logn'; hint: the names here: long, short"):
        check_weights(named, [sample(("a", "short"), ("b", "long"))])
    with pytest.raises(DataError, match="3 caption weights, but at most 2 captions"):
        check_weights(DataSource(path=".", captions=[1, 1, 1]), [sample(("a", ""), ("b", ""))])
    short = DataSource(path=".", captions={"short": 1})
    with pytest.raises(DataError, match=r"a\.png: no caption that data\.captions gives a weight"):
        check_weights(short, [sample(("a", "short")), sample(("b", "long"))])


VISITS = 4000


def choices(
    weights: list[list[float]],
    dropout: float = 0.0,
    *,
    seed: int = 7,
    ids: tuple[int, ...] = (5,),
    visits: int = VISITS,
) -> list[list[int | None]]:
    """For each sample the chosen caption of each visit, by its place among the sample's own; None: dropped."""
    counts = np.array([len(row) for row in weights])
    choice = CaptionChoice(np.array(ids, np.uint64), counts, weights, np.full(len(ids), dropout), seed)
    rows = []
    for number in range(len(ids)):
        places, dropped = choice.choose(np.full(visits, number), np.arange(visits))
        rows.append(
            [None if gone else int(at) for at, gone in zip(places - choice.first[number], dropped, strict=True)]
        )
    return rows


def test_captions_are_chosen_as_weighted_and_dropped_as_told() -> None:
    [chosen, alone] = choices([[0.2, 0.0, 0.8, 0.0], [2.0]], 0.1, ids=(3, 5))
    # Five standard deviations of a binomial share at 4,000 draws are below 0.04.
    assert chosen.count(None) / VISITS == pytest.approx(0.1, abs=0.04)
    assert chosen.count(0) / VISITS == pytest.approx(0.9 * 0.2, abs=0.04)
    assert chosen.count(1) == chosen.count(3) == 0
    assert set(alone) == {0, None}
    [alike] = choices([[1, 1, 1]])
    for index in range(3):
        assert alike.count(index) / VISITS == pytest.approx(1 / 3, abs=0.04)
    assert set(choices([[1]], 1.0)[0]) == {None}


def test_a_choice_depends_on_seed_sample_and_visit_alone() -> None:
    def forty(seed: int, name: int) -> list[int | None]:
        return choices([[1, 1, 1]], 0.1, seed=seed, ids=(name,), visits=40)[0]

    first = forty(0, 1)
    assert forty(1, 1) != first
    assert forty(0, 2) != first
    assert forty(0, 1) == first
    beside = choices([[1, 2], [1, 1, 1]], 0.1, seed=0, ids=(9, 1), visits=40)[1]
    assert beside == first  # who else is there does not matter


def test_dropout_and_choice_are_independent() -> None:
    """The same visits with and without dropout read the same caption wherever it is not dropped."""
    [kept], [halved] = choices([[1, 2, 3]]), choices([[1, 2, 3]], 0.5)
    assert all(drop in (None, keep) for keep, drop in zip(kept, halved, strict=True))
    assert 0.45 < halved.count(None) / VISITS < 0.55
    for index in range(3):
        assert halved.count(index) / kept.count(index) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("suffix", [".caption", ".TXT", ".Caption", ".txt"])
def test_every_spelling_of_a_side_car_is_read(tmp_path: Path, suffix: str) -> None:
    """A class name must not stand in for a caption that is there."""
    picture(tmp_path / "10_cat" / "a.png").with_suffix(suffix).write_text("a grey cat\n")
    [sample] = read_folder(tmp_path, folder_captions=True)
    assert sample.captions == ("a grey cat",)


def test_side_cars_of_several_spellings_join(tmp_path: Path) -> None:
    for suffix, text in ((".txt", "one"), (".caption", "two"), (".CAPTION", "one")):
        picture(tmp_path / "a.png").with_suffix(suffix).write_text(text)
    [sample] = read_folder(tmp_path)
    assert sample.captions == ("one", "two")


@pytest.mark.parametrize("name", ["a.json", "a.png.txt", "a.tags", "a"])
def test_what_may_be_a_caption_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "10_cat" / "a.png")
    (tmp_path / "10_cat" / name).write_text("a grey cat")
    told = f"this picture has no caption; hint: {tmp_path}/10_cat/{name} is not read: write a .txt"
    assert told in refusal(tmp_path)
    assert len(read_folder(tmp_path, folder_captions=True)) == 1
    assert "beside pictures" in caplog.text
    assert f"10_cat/{name}" in caplog.text


def test_where_captions_stand_is_counted(tmp_path: Path) -> None:
    for index, name in enumerate(["10_cat/a.png", "10_cat/b.png", "c.png"]):
        picture(tmp_path / name, index)
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    listed(tmp_path, {"file_name": "10_cat/a.png", "text": "a cat", "description": "grey"})
    found = read(DataSource(path=str(tmp_path), folder_captions=True))
    assert found.origins == {"text": 1, "description": 1, "folder name": 1, ".txt": 2}
    assert found.repeats == {"10_cat": 10}
