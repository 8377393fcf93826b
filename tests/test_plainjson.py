"""JSON of others: what is wrong with it is a ValueError, whatever it is."""

from __future__ import annotations

import json

import pytest

from libreflux import plainjson


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[" * 200_000,
        '{"a":' * 100_000,
        '"\\ud83d"',
        '["a", {"b": "\\uDE00 fox"}]',
        '{"\\ud83d": 1}',
        "9" * 5000,
        '"\ud83d"',
    ],
)
def test_what_cannot_be_used_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        plainjson.parse(text)


def test_a_long_text_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plainjson, "MOST_CHARACTERS", 10)
    with pytest.raises(ValueError, match="11 characters are more than 10"):
        plainjson.parse("[1,2,3,4,5]")


@pytest.mark.parametrize("value", [{"a": ["ü 狐", "\U0001f98a", None, 1.5]}, [], "x", "\\ud83d as text"])
def test_what_json_writes_is_read_back(value: object) -> None:
    assert plainjson.parse(json.dumps(value)) == value  # emoji as two halves, which are a character together
    assert plainjson.parse(json.dumps(value, ensure_ascii=False)) == value
