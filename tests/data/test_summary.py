"""What start-up tells of a source: counts, one caption, what crops leave out; too long and foreign captions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from transformers import T5Tokenizer

from libreflux.data.crops import View, views
from libreflux.data.prepare import prepare_recipe
from libreflux.data.quarantine import report_quarantine
from libreflux.data.sources import Quarantined, Sample, read
from libreflux.data.summary import SourceSummary, cropped, summarise
from libreflux.data.vocabulary import foreign_words
from libreflux.emoji import compose
from libreflux.errors import DataError
from libreflux.model.locate import locate
from libreflux.recipe import DataSource, load_recipe

SQUARE = [View("square", 32)]


def picture(path: Path, size: tuple[int, int], caption: str = "a red apple") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name), *size)).save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


def summary(folder: Path, **options: object) -> SourceSummary:
    source = DataSource.model_validate({"path": str(folder), **options})
    return summarise(source, read(source), SQUARE)


def test_a_source_is_told_in_two_lines(tmp_path: Path) -> None:
    picture(tmp_path / "10_cat" / "a.png", (40, 40), '{\n  "text": "a cat"\n}')
    picture(tmp_path / "wide.png", (160, 40))
    picture(tmp_path / "small.png", (8, 9))
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.json").touch()
    found = summary(tmp_path, min_size=16)
    assert found.lines() == [
        f"{tmp_path}: 2 pictures, 4 captions (.txt 4), 1 smaller than min_size, left out: run, not read: 1 .md, "
        "10_cat shown 10 times an epoch, 11 shown an epoch, 60% of the pixels cropped off (75% of wide.png)",
        "  a.png: '{'",
    ]
    first, *rest, example = found.lines(40)  # of a terminal: nothing is lost, and no path is broken
    assert " ".join(line.strip() for line in (first, *rest)) == found.lines()[0]
    assert example == "  a.png: '{'"
    assert all(len(line) <= 40 for line in rest)


def test_a_caption_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (40, 40), "a \x1b[31mred\x07 cat")
    assert "\x1b" not in "".join(summary(tmp_path).lines())
    assert "cat" in summary(tmp_path).lines()[1]


def sample(size: tuple[int, int]) -> Sample:
    return Sample("0" * 32, f"{size}.png", ("a",), ("",), size=size)


def test_what_crops_leave_out_is_a_share_of_the_pixels() -> None:
    found = cropped([sample((400, 100)), sample((100, 100))], SQUARE)
    assert (found.share, found.most, found.file) == (300 * 100 / (500 * 100), 0.75, "(400, 100).png")
    both = cropped([sample((200, 100))], views(["square", "aspect"], [512]))
    assert both.share == pytest.approx((1 / 2 + 1 / 12) / 2)  # 704 x 384 is the nearest to its own shape
    assert cropped([], SQUARE).share == 0.0


def test_what_min_size_leaves_out_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = [Quarantined("1", Path(f"{number}.png"), "too small", too_small=True) for number in range(9)]
    report_quarantine(tmp_path, small, usable=1, share=0.0)
    assert not caplog.records
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 9
    with pytest.raises(DataError, match="too small; hint: lower min_size"):
        report_quarantine(tmp_path, small, usable=0, share=0.0)
    torn = Quarantined("2", Path("torn.png"), "unreadable picture")
    with pytest.raises(DataError, match=r"torn\.png: unreadable picture"):
        report_quarantine(tmp_path, [*small, torn], usable=1, share=0.4)
    secret = Quarantined("3", Path("secret.png"), "cannot be read (Permission denied)")
    with pytest.raises(DataError, match=r"secret\.png: cannot be read .*; hint: make it readable, remove it, or raise"):
        report_quarantine(tmp_path, [secret], usable=1, share=0.4)
    report_quarantine(tmp_path, [*small, torn], usable=1, share=0.5)
    assert "1 of 2 pictures cannot be used" in caplog.text


def test_python_callers_are_told_before_anything_is_encoded(
    tmp_path: Path, tiny_model_dir: Path, pictures: Path
) -> None:
    recipe = load_recipe(
        None,
        [f"model={tiny_model_dir}", f"data.0.path={pictures}", "resolution=32", "steps=1", f"out={tmp_path / 'run'}"],
    )
    heard: list[object] = []
    prepare_recipe(recipe, told=heard.append, progress=lambda done, total, note: heard.append(note))
    places = [place for place, one in enumerate(heard) if isinstance(one, SourceSummary)]
    notes = [place for place, one in enumerate(heard) if "/s" in str(one)]
    assert len(places) == 1
    assert places[0] < min(notes)
    found = heard[places[0]]
    assert isinstance(found, SourceSummary)
    assert (found.pictures, found.captions, found.origins) == (7, 21, {"captions": 21})


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(locate("emoji-base") / "tokenizer_2", local_files_only=True)


@pytest.mark.parametrize(
    ("captions", "share", "words"),
    [
        (["A fox on a rocket, on blue"], 0.0, ()),
        (["a photograph of my grandmother", "of my photograph"], 3 / 7, ("photograph", "grandmother")),
        (["лиса в лесу"], 1.0, ("лесу", "лиса")),
        (["狐狸"], 1.0, ("狐狸",)),
        (["1920x1080, 3, !"], 0.0, ()),
        ([], 0.0, ()),
    ],
)
def test_words_that_are_spelled_letter_by_letter_are_foreign(
    tokenizer: T5Tokenizer, captions: list[str], share: float, words: tuple[str, ...]
) -> None:
    found = foreign_words(captions, tokenizer)
    assert (found.share, found.words) == (pytest.approx(share), words)


def test_the_emoji_familys_own_captions_are_not_foreign_to_it(tokenizer: T5Tokenizer) -> None:
    scenes = [compose.scene(3, index) for index in range(100)]
    assert foreign_words([text for one in scenes for text in compose.captions(one).values()], tokenizer).share == 0
    pencil = foreign_words([compose.pencil_captions(one)["long"] for one in scenes], tokenizer)
    assert pencil.share > 0.1
    assert "pencil" in pencil.words


def test_foreign_and_overlong_captions_are_told_once_with_their_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_model_dir: Path
) -> None:
    def told(data: Path, *prompts: str) -> list[str]:
        caplog.clear()
        values = [f"model={tiny_model_dir}", f"data.0.path={data}", "data.0.caption_dropout=0", "resolution=32"]
        values += ["steps=1", "text_cache=none", f"out={tmp_path / data.name / 'run'}"]
        recipe = load_recipe(None, [*values, f"samples.prompts={json.dumps(prompts)}"])
        with caplog.at_level(logging.WARNING):
            batches, _ = prepare_recipe(recipe)
            captions = [path.read_text(encoding="utf-8").strip() for path in sorted(data.glob("*.txt"))]
            for _ in range(3):
                batches.text(captions)
        return [record.message for record in caplog.records]

    for number in range(3):
        picture(tmp_path / "long" / f"{number}.png", (40 + number, 40), "a red apple " * (400 if number == 1 else 1))
        picture(tmp_path / "foreign" / f"{number}.png", (40, 40 + number), "лиса, a red apple")
    full = "texts of 512 tokens or more, of which the model reads no more than these"
    assert told(tmp_path / "long") == [f"{full}: 1, the first is that of {tmp_path}/long/1.png"]
    [line] = told(tmp_path / "long", "an apple " * 600)
    assert line == f"{full}: 2, the first is the prompt '{('an apple ' * 600)[:40]}'…"
    [line] = told(tmp_path / "foreign")
    assert line.startswith("33 % of the captions' words are foreign to this model's text encoder")
    assert "лиса" in line
