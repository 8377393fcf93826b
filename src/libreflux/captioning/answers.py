"""An answer of a vision-language model: its caption, or why it is none."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Fault = Literal["empty", "repeating", "refused", "cut", "unreadable", "server"]
"""Why there is no caption. The last two are not the answer's fault: the picture's, or the server's."""
WORTH_ASKING_AGAIN = ("empty", "repeating", "refused", "cut")
"""Faults for which the model is asked again."""
MEANINGS: dict[Fault, str] = {
    "empty": "the answer is empty",
    "repeating": "the answer repeats itself",
    "refused": "the model refused to answer",
    "cut": "the answer is longer than its limit",
    "unreadable": "the picture cannot be read",
    "server": "the server gave no answer",
}


@dataclass(frozen=True)
class Answer:
    """What came of one question.

    Attributes:
        text: as the model wrote it; of a fault that is not the answer's, what went wrong.
        cut: whether the limit of tokens ended it.
        fault: what is known to be wrong before the text is looked at.
    """

    text: str
    cut: bool = False
    fault: Fault | None = None


MOST_CHARACTERS = 100_000
"""Of an answer; more than 4,096 tokens have. A server may know no limit of tokens."""
_THOUGHT = re.compile(r"<(think|thinking)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r"\A.*</(?:think|thinking)>", re.DOTALL | re.IGNORECASE)  # its start is in some templates
_LABEL = re.compile(
    r"(?:\*\*)?(?:short |long |image )?(?:caption|description|tags)(?:\*\*)?\s*:(?:\*\*)?\s+", re.IGNORECASE
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}
_REFUSAL = re.compile(
    r"(?:i['’]?m|i am|we are|we['’]re) (?:very |really |so )?(?:sorry|afraid)\b"
    r"|(?:sorry|apologies|my apologies)\b[\s,.!:;—–-]*(?:\Z|(?:but|i|i['’]m|we|for|about|this|that|it|no)\b)"
    r"|i (?:must )?apologi[sz]e\b"
    r"|(?:unfortunately,? )?(?:i|we) (?:can['’]?t|cannot|can not|won['’]?t|will not|(?:a|['’])m (?:not able|unable))\b"
    r"|i['’]m (?:not able|unable)\b|i (?:do not|don['’]t) (?:see|feel|have)\b|i (?:must|have to|need to) decline\b"
    r"|as an? (?:ai|(?:large )?language model|text-based)\b|unfortunately,? (?:i|this request)\b"
    r"|(?:please|could you) (?:upload|attach|provide|share)\b"
    r"|(?:it (?:looks|seems|appears) (?:like|that|as if) )?(?:there is|there['’]s) no (?:image|picture)\b",
    re.IGNORECASE,
)
"""As a model says it that refuses, or one that was shown no picture: a server may drop it before a text model."""
_MOST_PERIOD, _LEAST_REPEATS, _LEAST_WORDS = 24, 4, 8
_LETTERS = re.compile(r"(.{1,40}?)\1{5,}", re.DOTALL)
_LEAST_LETTERS = 24


def caption_of(answer: Answer) -> tuple[str, Fault | None]:
    """The caption in an answer, on one line, and what is wrong with it; None where it is of use."""
    caption = clean(answer.text[:MOST_CHARACTERS])
    if answer.fault is not None:
        return caption, answer.fault
    if answer.cut or len(answer.text) > MOST_CHARACTERS:
        return caption, "repeating" if repeats_itself(caption) else "cut"
    if not any(unicodedata.category(letter)[0] in "LN" for letter in caption):
        return caption, "empty"
    if is_refusal(caption):
        return caption, "refused"
    return caption, "repeating" if repeats_itself(caption) else None


def clean(text: str) -> str:
    """A text on one line, without thoughts that are marked as such, a label ("Caption:") or quotes around all of it."""
    text = _THOUGHT_END.sub(" ", _THOUGHT.sub(" ", text))
    shown = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in text)
    line = " ".join(shown.split())
    if label := _LABEL.match(line):
        line = line[label.end() :]
    if len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and line[1:-1].find(line[0]) < 0:
        line = line[1:-1].strip()
    return line


def is_refusal(caption: str) -> bool:
    """Whether it begins as models begin that refuse."""
    return _REFUSAL.match(caption) is not None


def repeats_itself(caption: str) -> bool:
    """Whether words, tags, sentences or letters come again and again, as in a model that is caught in a loop.

    That is: up to 24 words four times in a row, eight words in all or more; one sentence of four words three times; of
    eight tags or more half are repeats; or up to 40 letters six times in a row, 24 letters in all or more, and of signs
    alone more than half of the caption.
    """
    words = caption.casefold().split()
    if any(_longest_repeat(words, period) for period in range(1, min(_MOST_PERIOD, len(words) // 2) + 1)):
        return True
    sentences = [part.split() for part in re.split(r"[.!?。！？]+", caption.casefold())]
    told = Counter(" ".join(part) for part in sentences if len(part) >= 4)
    if any(count >= 3 for count in told.values()):
        return True
    tags = [tag.strip() for tag in caption.casefold().split(",")]
    if len(tags) >= 8 and len(set(tags)) <= len(tags) / 2:
        return True
    runs = [found[0] for found in _LETTERS.finditer(caption) if len(found[0]) >= _LEAST_LETTERS]
    # A line of dots or dashes may be quoted from the picture; a caption of little else is none.
    return any(any(map(str.isalnum, run)) or 2 * len(run) > len(caption) for run in runs)


def _longest_repeat(words: list[str], period: int) -> bool:
    """Whether some `period` words stand often enough in a row."""
    least = max(_LEAST_REPEATS * period, _LEAST_WORDS)
    run = period
    for index in range(period, len(words)):
        run = run + 1 if words[index] == words[index - period] else period
        if run >= least:
            return True
    return False
