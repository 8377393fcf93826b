"""Which letters of a quoted text were drawn: the text of a prompt against what was read in its picture.

What counts, of the text and of what was read alike: letters, digits and marks, after Unicode's compatibility
composition (NFKC) and without regard to case (ß is ss). Spaces, line breaks, punctuation and symbols do not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

QUOTES = (('"', '"'), ("“", "”"), ("„", "“"), ("„", "”"), ("«", "»"), ("»", "«"), ("「", "」"), ("『", "』"))
"""Opening and closing. Single quotes are apostrophes too, and do not count."""
_CURVED = "„“”"
_QUOTED = re.compile(
    "|".join(
        # Of straight quotes, 5" is no opening and "5 no closing one.
        # In „OPEN” and “CLOSED” the third mark closes nothing: no curved mark stands inside a pair of them.
        rf"(?<!\w){a}([^{a}\n]*){b}(?!\w)" if a == b else rf"{a}([^{a}{b}{_CURVED if a in _CURVED else ''}\n]*){b}"
        for a, b in QUOTES
    )
)
MOST_STATES = 20_000
"""Of `read_letters`: what several texts take together, each with one more than its letters."""


def quoted(prompt: str) -> tuple[str, ...]:
    """The texts that a prompt has in double or typographic quotes, in its order; those without a letter are left out.

    `a sign that says "OPEN", and “24 hours” below` has OPEN and 24 hours.
    """
    found = (next(text for text in match.groups() if text is not None) for match in _QUOTED.finditer(prompt))
    return tuple(text.strip() for text in found if letters(text))


def letters(text: str) -> str:
    """What counts of a text, see the module."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(each for each in plain if unicodedata.category(each)[0] in "LNM")


@dataclass(frozen=True)
class ReadLetters:
    """What was read in one picture.

    Attributes:
        wanted: letters of the quoted texts.
        wrong: edit distance of the quoted texts and the words that were taken for them, 0 to `wanted`.
        extra: letters of the words that were taken for none of them.
    """

    wanted: int
    wrong: int
    extra: int

    @property
    def share(self) -> float:
        """Of letters right, 0 to 1: 1 − edit distance / letters."""
        return min(1.0, max(0.0, 1 - self.wrong / self.wanted))


def read_letters(texts: Sequence[str], lines: Sequence[str]) -> ReadLetters:
    """Compares quoted texts with the lines that were read, by the best assignment of words to texts.

    Each word of the lines is taken for one text or for none. The words of a text, in the order in which they were
    read, are joined and compared by Levenshtein's edit distance. Of all assignments the one with the least sum of
    distances counts, of equals the one with the fewest letters left over. It is found exactly, by one dynamic program
    over the words whose state is how much of each text is matched. Texts that would take more than `MOST_STATES` are
    joined with their neighbours in the prompt, the shortest first.

    Args:
        texts: at least one, each with a letter.
        lines: in reading order.
    """
    kept = _joined([letters(text) for text in texts])
    words = [word for line in lines for word in map(letters, line.split()) if word]
    sizes, total = [len(text) for text in kept], sum(map(len, words))
    unit = total + 1  # a letter that is wrong weighs more than all that are left over
    ramps = [_along(np.arange(size + 1) * unit, axis, len(kept)) for axis, size in enumerate(sizes)]
    costs = np.zeros([size + 1 for size in sizes], np.int64) + sum(ramps)
    for word in words:
        taken = (_edited(costs, word, text, ramps[axis], axis, unit) for axis, text in enumerate(kept))
        costs = np.minimum.reduce([costs + len(word), *taken])
    wrong, extra = divmod(int(costs[(-1,) * len(kept)]), unit)
    return ReadLetters(sum(sizes), wrong, extra)


def _edited(costs: np.ndarray, word: str, text: str, ramp: np.ndarray, axis: int, unit: int) -> np.ndarray:
    """Costs after a word's letters were read for this text: one row of Levenshtein's table for each letter."""
    for letter in word:
        same = _along(np.array([letter != each for each in text]) * unit, axis, costs.ndim)
        first, last = [slice(None)] * costs.ndim, [slice(None)] * costs.ndim
        first[axis], last[axis] = slice(None, -1), slice(1, None)
        rows = costs + unit
        rows[tuple(last)] = np.minimum(rows[tuple(last)], costs[tuple(first)] + same)
        # A letter of the text that was not read costs one too: min over j' ≤ j of row[j'] + (j − j').
        costs = np.minimum.accumulate(rows - ramp, axis=axis) + ramp
    return costs


def _along(row: np.ndarray, axis: int, axes: int) -> np.ndarray:
    return row.reshape([-1 if each == axis else 1 for each in range(axes)])


def _joined(texts: list[str]) -> list[str]:
    """Texts whose states are few enough."""
    while len(texts) > 1 and np.prod([float(len(text) + 1) for text in texts]) > MOST_STATES:
        at = min(range(len(texts) - 1), key=lambda place: len(texts[place]) + len(texts[place + 1]))
        texts = [*texts[:at], texts[at] + texts[at + 1], *texts[at + 2 :]]
    return texts
