"""Quoted texts against what was read: the rules of what counts, and the best assignment against every assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from libreflux.probing.metrics import letters as module
from libreflux.probing.metrics.letters import letters, quoted, read_letters


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN", and “24 hours” below', ("OPEN", "24 hours")),
        ("„Guten Tag“ und «bon jour» und »Hallo«", ("Guten Tag", "bon jour", "Hallo")),
        ("「日本」 on a flag", ("日本",)),
        ("„OPEN” beside “CLOSED”, “A” and „B“", ("OPEN", "CLOSED", "A", "B")),
        ('text:"OPEN"', ("OPEN",)),
        ("it says \"it's 5 o'clock\"", ("it's 5 o'clock",)),
        ('a 5" nail and a 3" hole', ()),
        ("it's John's 'shop'", ()),
        ('an empty "" and a dotted "…" one', ()),
        ("no text at all", ()),
    ],
)
def test_what_stands_in_double_or_typographic_quotes_is_quoted(prompt: str, texts: tuple[str, ...]) -> None:
    assert quoted(prompt) == texts


def test_letters_digits_and_marks_count_without_case_and_spaces() -> None:
    assert letters("Open — 24 Hours!") == "open24hours"
    assert letters("STRASSE") == letters("Straße")
    assert letters("cafe\u0301") == letters("CAFÉ") != letters("cafe")
    assert letters("ﬁＡ５") == "fia5"
    assert letters("5€ … ½") == "512"


@pytest.mark.parametrize(
    ("texts", "lines", "share", "extra"),
    [
        (["OPEN"], ["Open"], 1, 0),
        (["OPEN"], ["OPEM"], 3 / 4, 0),  # one letter is another
        (["OPEN"], ["OPN"], 3 / 4, 0),  # one is missing
        (["OPEN"], ["OPPEN"], 3 / 4, 0),  # one is there twice
        (["OPEN"], [], 0, 0),
        (["OPEN"], ["something else", "altogether"], 0, 19),  # "else" is as good as nothing, and leaves less over
        (["free beer today"], ["FREE", "BEER TODAY"], 1, 0),  # broken into lines
        (["OPEN"], ["SHOP", "OPEN NOW"], 1, 7),  # told apart
        (["OPEN", "24 hours"], ["24 HOURS", "OPEN"], 1, 0),  # in another order
        (["OPEN", "24 hours"], ["OPEN 24 hours"], 1, 0),  # on one line
        (["OPEN", "24 hours"], ["24 HOURS"], 7 / 11, 0),
        (["left side", "right side"], ["LEFT RIGHT", "SIDE SIDE"], 1, 0),  # in two columns
        (["OPEN", "OPEN"], ["OPEN"], 1 / 2, 0),  # no line counts twice
    ],
)
def test_planted_errors_give_the_share_that_they_should(
    texts: list[str], lines: list[str], share: float, extra: int
) -> None:
    found = read_letters(texts, lines)
    assert found.share == pytest.approx(share)
    assert found.extra == extra


def distance(a: str, b: str) -> int:
    """Levenshtein's, as it is defined."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_of_all_assignments_is_found(count: int) -> None:
    random = np.random.default_rng(count)

    def word(most: int) -> str:
        return "".join(random.choice(list("abc"), random.integers(1, most + 1)))

    for _ in range(6):
        texts, words = [word(4) for _ in range(count)], [word(2) for _ in range(4)]
        every = []
        for taken in itertools.product(range(count + 1), repeat=len(words)):
            parts = ["".join(one for one, to in zip(words, taken, strict=True) if to == text) for text in range(count)]
            left = sum(len(one) for one, to in zip(words, taken, strict=True) if to == count)
            every.append((sum(map(distance, texts, parts)), left))
        found = read_letters(texts, words)
        assert (found.wrong, found.extra) == min(every)


def test_texts_too_many_to_be_told_apart_are_joined_in_the_prompts_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_STATES", 30)
    assert read_letters(["abc", "def", "ghi"], ["abc def", "ghi"]).share == 1
    assert read_letters(["abc", "def", "ghi"], ["ghi", "def", "abc"]).share < 1
