"""Which answers are captions: planted ones of every kind that is none, and honest ones that look like them."""

from __future__ import annotations

import pytest

from libreflux.captioning.answers import MOST_CHARACTERS, Answer, caption_of, clean, is_refusal, repeats_itself

FOX = "A red fox stands on a snowy hill, and looks at the camera."


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (f'  "{FOX}"\n', FOX),
        (f"“{FOX}”", FOX),
        ("Caption: a fox\n\nin snow", "a fox in snow"),
        ("**Short caption:** a fox", "a fox"),
        ("<think>The user wants\na caption.</think>\na fox", "a fox"),
        ("<think>never ends", ""),
        ("The template has begun to think.\n</think>\n\na fox", "a fox"),
        ('"Stop" and "go" on signs', '"Stop" and "go" on signs'),
        ("a\x00fox\u2028in\x1b[2J snow", "a fox in [2J snow"),
        ("half \ud83d a character", "half a character"),
        ("Tags are words", "Tags are words"),
        ("", ""),
    ],
)
def test_what_is_not_of_the_caption_goes(text: str, caption: str) -> None:
    assert clean(text) == caption


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot describe this picture.",
        "Sorry, I can't assist with this request.",
        "I cannot provide a description of this person.",
        "I can't identify people in pictures.",
        "I am unable to view images.",
        "I'm not able to help with that.",
        "As an AI language model, I do not see pictures.",
        "Unfortunately, I cannot comply.",
        "I apologize, but this goes against my guidelines.",
        "My apologies, I won't do that.",
        "Sorry! No.",
        "Sorry.",
        "I don't see any image. Please upload one.",
        "I don’t feel comfortable describing this person.",
        "It looks like there's no image attached.",
        "As a language model I have no eyes.",
        "Please provide the picture that you mean.",
        "I must decline.",
    ],
)
def test_refusals_are_known(text: str) -> None:
    assert caption_of(Answer(text)) == (text, "refused")


@pytest.mark.parametrize(
    "text",
    [
        FOX,
        "A woman holds a card that says “I'm sorry”.",
        "Icebergs that cannot be seen from the shore.",
        "Sorrel leaves on a plate.",
        "Sorry! The board game of 1972, its box open on a table.",
        "sorry, sign, shop, closed, door, glass, red, paper",
        "As an aircraft lands, a crowd waves.",
        "It looks like snow over the hills.",
        "There is no car in the street, only snow.",
        "very, very, very dark red",
        "fox, snow, hill, red, winter, animal, fur, tail, ears, outdoors",
        "A red fox on the left, a red fox on the right, and a red fox between them.",
        "A sign reads 'ha ha ha ha'. Below it people laugh.",
        "1000000000000 written in sand",
        "A page of a book with the words “Chapter 1 .............................. 5” and two lines below.",
        "狐が雪の上に座っている。",
        "The sky is blue. The sea is blue too. The sand is white.",
    ],
)
def test_honest_captions_are_left_alone(text: str) -> None:
    assert not is_refusal(text)
    assert caption_of(Answer(text)) == (text, None)


@pytest.mark.parametrize(
    "text",
    [
        "a fox in the snow in the snow in the snow in the snow in the snow",
        "red red red red red red red red red",
        "!" * 40,
        "雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪雪",
        "fox, snow, fox, snow, red, fox, snow, red, fox, snow",
        "The fox is red. It sits in deep snow. The fox looks up. It sits in deep snow. Trees. It sits in deep snow.",
        " ".join(["the fox and the owl sit on a tall tree by the lake in deep snow"] * 4),
    ],
)
def test_loops_are_known(text: str) -> None:
    assert repeats_itself(text)
    assert caption_of(Answer(text))[1] in ("repeating", "empty")
    assert caption_of(Answer(f"word {text}", cut=True))[1] == "repeating"


def test_an_answer_without_end_is_cut_soon() -> None:
    """A server may know no limit of tokens."""
    endless = " ".join(f"It is number {number}." for number in range(200_000))
    caption, fault = caption_of(Answer(endless))
    assert fault == "cut"
    assert len(caption) <= MOST_CHARACTERS


@pytest.mark.parametrize("text", ["", " \n", "...", '""', "<think>hm</think>", "—"])
def test_nothing_said_is_empty(text: str) -> None:
    assert caption_of(Answer(text))[1] == "empty"


def test_a_cut_answer_and_what_is_not_the_answers_fault() -> None:
    assert caption_of(Answer(FOX, cut=True)) == (FOX, "cut")
    assert caption_of(Answer("no such file", fault="unreadable")) == ("no such file", "unreadable")
    assert caption_of(Answer("filtered", fault="refused")) == ("filtered", "refused")
