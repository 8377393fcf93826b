"""Questions and their answers: each is asked until its answer is of use, or as often as is allowed."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from libreflux import seeding
from libreflux.captioning.answers import WORTH_ASKING_AGAIN, Answer, Fault, caption_of

if TYPE_CHECKING:
    from PIL import Image

RETRY_TEMPERATURE = 0.7
"""The least temperature of a question that is asked again: at 0 the answer would be the same."""

OpenPicture = Callable[[str], "Image.Image"]
"""Gives a picture by its name, RGB and of the size that is asked about. Raises DataError."""


@dataclass(frozen=True, slots=True)
class Question:
    """One caption of one picture.

    Attributes:
        file: the picture's path below its folder, with "/".
        name: the caption's.
        prompt: what is asked.
        attempt: how often it was asked before.
    """

    file: str
    name: str
    prompt: str
    attempt: int = 0


@dataclass(frozen=True)
class Wording:
    """How answers are written.

    Attributes:
        max_tokens: of an answer, at most.
        temperature: of the first answer; 0 takes the likeliest words.
        seed: of all answers; each one's own is a function of it and of the question.
    """

    max_tokens: int
    temperature: float
    seed: int

    def temperature_of(self, question: Question) -> float:
        """Of the answer to a question."""
        return max(self.temperature, RETRY_TEMPERATURE) if question.attempt else self.temperature

    def seed_of(self, question: Question) -> int:
        """31 bits: what every server takes."""
        return seeding.key(self.seed, "caption answer", question.file, question.name, question.attempt) >> 33


@dataclass(frozen=True)
class Settled:
    """What became of a question.

    Attributes:
        question: as it was asked last.
        caption: on one line; of a fault, the last answer, or what went wrong.
        fault: None where the caption is of use.
    """

    question: Question
    caption: str
    fault: Fault | None


Take = Callable[[], Question | None]


class Asker(Protocol):
    """Who answers: a model, or a server."""

    def answers(self, take: Take) -> Iterator[tuple[Question, Answer]]:
        """Questions and answers, in whatever order, until there are no more questions and each has its answer.

        Args:
            take: the next question; None where there is none now. An answer that was given out may make a new one.
        """


def settle(questions: Iterable[Question], asker: Asker, tries: int) -> Generator[Settled, None, None]:
    """Asks each question until its answer is of use, at most `tries` times.

    Raises:
        RunError: the server cannot go on.
    """
    fresh, again = iter(questions), deque[Question]()

    def take() -> Question | None:
        return again.popleft() if again else next(fresh, None)

    for question, answer in asker.answers(take):
        caption, fault = caption_of(answer)
        if fault in WORTH_ASKING_AGAIN and question.attempt + 1 < tries:
            again.append(dataclasses.replace(question, attempt=question.attempt + 1))
        else:
            yield Settled(question, caption, fault)
