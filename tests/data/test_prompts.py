"""Prompts of text files, lists and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libreflux.data.prompts import read_prompts
from libreflux.errors import DataError


def test_a_text_file_has_a_prompt_on_each_line_that_is_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeff\ufeffa fox  on\tyellow \r\n\r\n\ufeff# 1 in the list\n   \nein Übel\u2028zwei\na fox on yellow".encode()
    )
    assert read_prompts(path) == ["a fox on yellow", "# 1 in the list", "ein Übel zwei", "a fox on yellow"]


def test_a_list_gives_its_captions_and_asks_for_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    rows = [
        {"file_name": "gone.png", "text": "a fox", "prompt": " a  fox", "captions": ["a fox"]},
        {"captions": {"short": "an owl", "long": ["a", "b"]}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_prompts(path) == ["a fox", "an owl", "a", "b"]


def test_a_folder_gives_its_captions_by_file_name_and_no_picture_is_opened(tmp_path: Path) -> None:
    for name, text in (("b", "two\nthree\n"), ("a", "one\n"), ("c", "two\n")):
        (tmp_path / f"{name}.png").write_bytes(b"all the same bytes, and no picture")
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_prompts(tmp_path) == ["one", "two", "three", "two"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "no such file"),
        ("blank.txt", b"\n \n", "no prompt in it; hint: write one prompt a line"),
        ("a.json", b'["a fox"]', r"prompts are not read from \.json files; hint: write a \.txt with one prompt a line"),
        ("a.CSV", b"text\na fox\n", r"not read from \.csv files"),
        ("a.yaml", b"- a fox\n", r"not read from \.yaml files"),
        ("latin.txt", "ein Übel".encode("latin-1"), "cannot be read as UTF-8"),
        ("a.jsonl", b"{", r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: no caption in this line"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: text: 3 is no caption"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(tmp_path / name)
