from __future__ import annotations

import pytest

from libreflux.cli.prepare import parse_part
from libreflux.errors import RecipeError


def test_parts_are_counted_from_one_or_taken_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parse_part(None) == (0, 1)
    assert [parse_part(text) for text in ("1/1", "1/3", "3/3")] == [(0, 1), (0, 3), (2, 3)]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_part(None) == (2, 4)
    assert parse_part("1/3") == (0, 3)


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "a/b", "1/3/5"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no part; mend: write 1/4 to 4/4"):
        parse_part(text)
