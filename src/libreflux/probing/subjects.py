"""What a prompt asks for, read from its words, and which subjects a model has been trained on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from libreflux.errors import DataError
from libreflux.probing.judges import COLOUR, SUBJECT


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what it names: question → answer, see `Judge.questions`."""

    text: str
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str | None:
        """The subject that it names, None for none."""
        return self.named.get(SUBJECT)

    @property
    def colour(self) -> str | None:
        """The colour of the background, None where it names none."""
        return self.named.get(COLOUR)


def parse_prompt(text: str, questions: Mapping[str, Collection[str]]) -> ParsedPrompt:
    """Reads "a small red apple on blue": a colour after the last "on", the longest known answers of others before it.

    Answers that hold an "on" themselves are looked for in the whole text, as are all where no known colour ends it.
    """
    before, _, after = text.rpartition(" on ")
    colour = after.strip() if before and after.strip() in questions.get(COLOUR, ()) else None
    named = {} if colour is None else {COLOUR: colour}
    for question, answers in questions.items():
        if question != COLOUR:
            whole = {answer for answer in answers if f" {answer}".startswith(" on ")}
            found = find_name(text, whole) or find_name(before if colour else text, set(answers) - whole)
            named |= {} if found is None else {question: found}
    return ParsedPrompt(text, named)


def find_name(text: str, names: Collection[str]) -> str | None:
    """The longest of these names that a text contains as whole words; of equals the first said."""
    found = [(-len(name), match.start(), name) for name in names if (match := _said(name, text))]
    return min(found)[2] if found else None


def _said(name: str, text: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)


def groups(named: Sequence[str | None], seen: Collection[str] | None) -> dict[str, np.ndarray]:
    """Subsets "all" and, where it is known what was trained on, "seen", "unseen"; units without a subject aside."""
    found = {"all": np.arange(len(named))}
    if seen is not None:
        found["seen"] = np.array([i for i, name in enumerate(named) if name in seen], np.int64)
        found["unseen"] = np.array([i for i, name in enumerate(named) if name and name not in seen], np.int64)
    return found


def read_seen(path: Path) -> tuple[str, ...]:
    """Subjects of a text file, one a line.

    Raises:
        DataError: unreadable or empty.
    """
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=path, hint="write one subject a line, in UTF-8") from None
    if not names:
        raise DataError("names no subject", where=path, hint="write one subject a line")
    return names
