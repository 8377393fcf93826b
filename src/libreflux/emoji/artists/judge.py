"""What the judge of the artists' pictures is asked, and its marks: what is there, by whom, how large, where, on what.

It is trained on composed pictures alone, never on what a model drew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from libreflux.emoji.artists import captions, scenes
from libreflux.emoji.artists.captions import Told
from libreflux.emoji.artists.scenes import Background, Figure, Scene
from libreflux.emoji.artists.subjects import LOOKS, all_subjects
from libreflux.emoji.compose import COLOURS
from libreflux.probing.judges import COLOUR, SUBJECT, Judge, Score

PLACES = (
    "centre",
    "left",
    "right",
    *(f"{down}{across}" for down in ("top", "bottom") for across in ("", " left", " right")),
)
SIZES = ("small", "medium", "large")
GROUNDS = tuple(
    ground
    for kind in scenes.KINDS
    for first in COLOURS
    for second in ([None] if kind == "plain" else [colour for colour in COLOURS if colour != first])
    for ground in [captions.ground(Background(first, second, kind))]
)


def questions() -> dict[str, tuple[str, ...]]:
    """What the judge tells apart: question → its answers. A colour is asked of plain backgrounds alone."""
    return {
        SUBJECT: tuple(subject.name for subject in all_subjects()),
        COLOUR: tuple(COLOURS),
        "look": LOOKS,
        "size": SIZES,
        "place": tuple(map(captions.where, PLACES)),
        "background": GROUNDS,
    }


def answers(figure: Figure, background: Background) -> dict[str, str]:
    """The right answer to each question for a picture of one figure."""
    return {
        SUBJECT: figure.subject.name,
        **({COLOUR: background.first} if background.kind == "plain" else {}),
        "look": figure.look,
        "size": figure.size,
        "place": captions.where(figure.place),
        "background": captions.ground(background),
    }


def fresh() -> Judge:
    """A judge of the artists' pictures that has learnt nothing yet."""
    return Judge(questions(), placed=(COLOUR, "size", "place", "background"))


def asked_of(told: Told) -> set[str]:
    """The questions that a caption with these facts asks; its background is asked as a whole, colour and kind."""
    facts = {"look": told.look, "size": told.size, "place": told.place, "background": told.background}
    return {SUBJECT, *(question for question, said in facts.items() if said)}


def halves(pixels: Tensor, relation: str) -> tuple[Tensor, Tensor]:
    """The two halves of [B, 3, H, W], first figure's first, each padded by its edges to [B, 3, H, W]."""
    across, down = scenes.RELATIONS[relation]
    side = pixels.shape[-1]
    if across:
        left, right = (F.pad(half, (side // 4,) * 2 + (0, 0), mode="replicate") for half in pixels.chunk(2, 3))
        return (left, right) if across < 0 else (right, left)
    top, bottom = (F.pad(half, (0, 0) + (side // 4,) * 2, mode="replicate") for half in pixels.chunk(2, 2))
    return (top, bottom) if down < 0 else (bottom, top)


@torch.no_grad()
def mark(judge: Judge, pixels: Tensor, what: Sequence[Scene], told: Sequence[Told], batch: int = 64) -> Score:
    """Judges pictures against what their captions told.

    Of a pair each half is judged: the two subjects, and their looks if they were told. Its background is not.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
    """
    right = {question: torch.ones(len(what), dtype=torch.bool) for question in judge.questions}
    asked = {question: torch.zeros(len(what), dtype=torch.bool) for question in judge.questions}
    features = [judge(part.float()).features for part in pixels.split(batch)]
    for row, (scene, facts) in enumerate(zip(what, told, strict=True)):
        wanted = asked_of(facts)
        views = [pixels[row : row + 1].float()]
        if scene.relation is not None:
            wanted &= {SUBJECT, "look"}
            views = list(halves(views[0], scene.relation))
        for view, figure in zip(views, scene.figures, strict=True):
            seen, truth = judge(view).answers, answers(figure, scene.background)
            for question in wanted:
                asked[question][row] = True
                guess = judge.questions[question][int(seen[question].argmax())]
                right[question][row] &= guess == truth[question]
    return Score(right, asked, torch.cat(features))
