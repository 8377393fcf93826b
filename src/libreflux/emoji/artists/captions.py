"""The grammar of captions: what is told of a scene, from its subject alone to everything, in words that people type.

    bare    a fox
    short   a small flat fox at the top left, on blue        each fact told or left out by chance
    full    a small flat fox at the top left, on blue        every fact
    tags    fox, flat, small, top left, blue background      each fact told or left out by chance
    long    The picture shows a fox. It is drawn in a flat style. …

Of a pair the relation is always told. Mirroring is told by no caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from libreflux import seeding
from libreflux.emoji.artists.scenes import Background, Figure, Scene

PLURALS = ("grapes", "cherries", "fries", "books", "scissors")
NO_ARTICLE = (*PLURALS, "corn", "fire", "beer", "wine", "coffee")
UNIQUE = ("sun", "moon")
STYLES = {
    "3d": "a glossy 3d style",
    "flat": "a flat style",
    "soft": "a soft style",
    "detailed": "a detailed style",
    "retro": "a retro style",
    "cartoon": "a cartoon style",
}


@dataclass(frozen=True)
class Told:
    """Which facts a caption has besides its subjects."""

    look: bool = False
    size: bool = False
    place: bool = False
    background: bool = False


ALL = Told(look=True, size=True, place=True, background=True)


def _by_chance(what: Scene, purpose: str) -> Told:
    rng = seeding.rng(0, f"caption-{purpose}", repr(what))
    look, size, place, background = rng.random(4) < (0.5, 0.4, 0.4, 0.65)
    return Told(bool(look), bool(size), bool(place), bool(background))


def told_by(what: Scene, kind: str) -> Told:
    """Which facts the caption of this kind has: short and tags leave some out by chance."""
    if kind in ("short", "tags"):
        return _by_chance(what, kind)
    return Told() if kind == "bare" else ALL


def _a(words: str, name: str) -> str:
    if name in NO_ARTICLE:
        return words
    if name in UNIQUE and words == name:
        return f"the {name}"
    return ("an " if words[0] in "aeiou" else "a ") + words


def thing(figure: Figure, told: Told) -> str:
    """As "a small flat fox": size and look where they are told."""
    told_size = [figure.size] if told.size else []
    told_look = [figure.look] if told.look else []
    return _a(" ".join([*told_size, *told_look, figure.subject.name]), figure.subject.name)


def ground(background: Background) -> str:
    """As "on blue", "on a blue to white gradient", "on half blue, half white"."""
    if background.kind == "plain":
        return f"on {background.first}"
    if background.kind == "gradient":
        return f"on {_a(background.first, background.first)} to {background.second} gradient"
    return f"on half {background.first}, half {background.second}"


def where(place: str) -> str:
    """As "at the top left", "in the centre"."""
    return "in the centre" if place == "centre" else f"at the {place}"


def phrase(what: Scene, told: Told) -> str:
    """One phrase with the facts that are told."""
    first = what.figures[0]
    if what.relation is not None:
        told_of_each = Told(look=told.look)
        words = f"{thing(first, told_of_each)} {what.relation} {thing(what.figures[1], told_of_each)}"
    else:
        words = thing(first, told) + (f" {where(first.place)}" if told.place else "")
    if not told.background:
        return words
    comma = "," if what.relation is not None or told.place else ""
    return f"{words}{comma} {ground(what.background)}"


def tags(what: Scene) -> str:
    """Words between commas, some facts left out by chance."""
    told = told_by(what, "tags")
    words = []
    for figure in what.figures:
        words += [figure.subject.name, *([figure.look] if told.look else [])]
    if what.relation is not None:
        words.append(f"first {what.relation} second")
    else:
        words += [*([what.figures[0].size] if told.size else []), *([what.figures[0].place] if told.place else [])]
    behind = what.background
    colours = behind.first if behind.second is None else f"{behind.first} and {behind.second}"
    kind = {"plain": "background", "gradient": "gradient", "halves": "halves"}[behind.kind]
    return ", ".join([*words, *([f"{colours} {kind}"] if told.background else [])])


def long(what: Scene) -> str:
    """Several sentences with every fact, their wording varied by the scene."""
    rng = seeding.rng(0, "caption-long", repr(what))
    parts = []
    for number, figure in enumerate(what.figures):
        name = figure.subject.name
        is_are, it_they, was = ("are", "They", "are") if name in PLURALS else ("is", "It", "is")
        opening = ("The picture shows", "This is a picture of", "Here we see")[rng.integers(3)]
        parts.append(f"{opening} {_a(name, name)}." if number == 0 else f"There {is_are} also {_a(name, name)}.")
        parts.append(f"{it_they} {was} drawn in {STYLES[figure.look]}.")
    if what.relation is not None:
        first, second = (figure.subject.name for figure in what.figures)
        parts.append(f"The {first} is {what.relation} the {second}.")
    else:
        parts.append(_extent(what.figures[0], rng))
    parts.append(_behind(what.background))
    return " ".join(parts)


def _extent(figure: Figure, rng: np.random.Generator) -> str:
    place = f"{where(figure.place)} of the picture"
    room = {
        "small": "with much empty space around",
        "medium": "with some space around",
        "large": "with little space around",
    }
    told = f"The subject is {figure.size} and stands {place}"
    return f"{told}, {room[figure.size]}." if rng.random() < 0.5 else f"{told}."


def _behind(background: Background) -> str:
    if background.kind == "plain":
        return f"The background is plain {background.first}."
    order = "from top to bottom" if background.upright else "from left to right"
    if background.kind == "gradient":
        return f"The background is a gradient from {background.first} to {background.second}, {order}."
    return f"The background is half {background.first} and half {background.second}, {order}."


def captions(what: Scene) -> dict[str, str]:
    """Every caption of a scene, by kind: bare, short, full, tags, long."""
    return {
        **{kind: phrase(what, told_by(what, kind)) for kind in ("bare", "short", "full")},
        "tags": tags(what),
        "long": long(what),
    }
