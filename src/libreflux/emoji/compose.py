"""Pictures of emoji with true captions, each a function of (seed, index).

One subject, or two with a relation, on one of ten plain colours; three captions each: short, tags, long.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from libreflux import seeding

PICTURES = Path(__file__).parent / "pictures"
SIDE = 128

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 218, 60),
    "green": (60, 170, 80),
    "blue": (50, 110, 225),
    "purple": (130, 60, 190),
    "pink": (250, 160, 200),
    "brown": (125, 80, 45),
    "black": (25, 25, 28),
    "white": (248, 248, 248),
}
SIZES = {"small": 0.42, "medium": 0.64, "large": 0.88}  # side of the subject over side of the picture
PLACES = {"centre": (0.5, 0.5), "left": (0.0, 0.5), "right": (1.0, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0)}
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # from the first to the second
PAIR_SIZE = 0.48
PLURALS = ("grapes", "cherries", "fries", "pancakes", "books", "scissors", "glasses")


@dataclass(frozen=True)
class Subject:
    name: str
    category: str
    file: str


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `size` and `place` are those of a lone subject; `relation` and `second` come together."""

    subject: Subject
    colour: str
    size: str = "large"
    place: str = "centre"
    relation: str | None = None
    second: Subject | None = None


@cache
def subjects() -> tuple[Subject, ...]:
    """The shipped subjects, in the order of `subjects.json`."""
    listed = json.loads((PICTURES / "subjects.json").read_text(encoding="utf-8"))["subjects"]
    return tuple(Subject(entry["name"], entry["category"], entry["file"]) for entry in listed)


@cache
def _cutout(file: str, side: int) -> Image.Image:
    picture = Image.open(PICTURES / file).convert("RGBA")
    # Premultiplied while scaling: otherwise hidden colours of transparent pixels bleed into the edges.
    return picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def scene(seed: int, index: int, *, pairs: float = 0.2) -> Scene:
    """The scene of (seed, index); a share `pairs` of all scenes shows two subjects."""
    rng = seeding.rng(seed, "scene", index)
    pool = subjects()
    first, second = (pool[i] for i in rng.choice(len(pool), 2, replace=False))
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    if rng.random() < pairs:
        return Scene(first, colour, "medium", "centre", list(RELATIONS)[rng.integers(len(RELATIONS))], second)
    size = str(rng.choice(list(SIZES), p=[0.2, 0.25, 0.55]))
    places = list(PLACES)
    place = "centre" if size == "large" or rng.random() < 0.5 else places[1 + rng.integers(len(places) - 1)]
    return Scene(first, colour, size, place)


def render(what: Scene, side: int = SIDE) -> Image.Image:
    """The RGB picture of a scene, `side` × `side` pixels."""
    canvas = Image.new("RGBA", (side, side), (*COLOURS[what.colour], 255))
    if what.second is None or what.relation is None:
        small = round(SIZES[what.size] * side)
        spots = [(what.subject, small, PLACES[what.place])]
    else:
        dx, dy = RELATIONS[what.relation]
        spots = [
            (what.subject, round(PAIR_SIZE * side), (0.5 - dx / 2, 0.5 - dy / 2)),
            (what.second, round(PAIR_SIZE * side), (0.5 + dx / 2, 0.5 + dy / 2)),
        ]
    for subject, small, (x, y) in spots:
        margin = round(0.02 * side)
        room = side - small - 2 * margin
        canvas.alpha_composite(_cutout(subject.file, small), (margin + round(x * room), margin + round(y * room)))
    return canvas.convert("RGB")


def _a(name: str) -> str:
    if name in PLURALS or name in ("popcorn", "corn", "bread", "cheese", "broccoli"):
        return name
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def _is(name: str) -> str:
    return "are" if name in PLURALS else "is"


def short_caption(what: Scene) -> str:
    if what.second is not None:
        return f"{_a(what.subject.name)} {what.relation} {_a(what.second.name)}, on {what.colour}"
    words = _a(what.subject.name)
    if what.size == "small":
        words = ("small " if words == what.subject.name else "a small ") + what.subject.name
    place = "" if what.place == "centre" else f" at the {what.place},"
    return f"{words}{place} on {what.colour}"


def tags_caption(what: Scene) -> str:
    if what.second is not None:
        tags = [what.subject.name, what.second.name, f"{what.relation}", "two subjects"]
    else:
        tags = [what.subject.name, *([what.size] if what.size != "medium" else [])]
        tags += [what.place] if what.place != "centre" else []
    return ", ".join([*tags, f"{what.colour} background", "emoji"])


def long_caption(what: Scene) -> str:
    """A true description of 30–150 words, its wording varied by the scene itself."""
    rng = seeding.rng(0, "long-caption", what.subject.name, what.colour, what.size, what.place, str(what.relation))
    style = str(
        rng.choice(
            [
                "It is drawn as a glossy three-dimensional emoji with soft shading.",
                "The style is that of a smooth, rounded, three-dimensional emoji.",
                "Everything is rendered like a polished emoji, with gentle highlights and no outlines.",
            ]
        )
    )
    ground = str(
        rng.choice(
            [
                f"The background is plain {what.colour}, one flat colour from edge to edge, with no text, "
                "no border and nothing else on it.",
                f"Behind is an even {what.colour} surface without any pattern, shadow or writing, "
                "and it reaches all four edges.",
            ]
        )
    )
    name = what.subject.name
    if what.second is not None:
        other = what.second.name
        seen = (
            f"The picture shows two things of equal size: {_a(name)} and {_a(other)}. "
            f"The {name} {_is(name)} {what.relation} the {other}, and they do not overlap. "
            f"The first is of the {what.subject.category} group and the second of the {what.second.category} group."
        )
    else:
        extent = {
            "small": "takes up less than half of the width, so that most of the picture stays empty",
            "medium": "takes up about two thirds of the width, with clear space around",
            "large": "fills most of the frame, with only a narrow space around",
        }[what.size]
        where = "in the centre of the picture" if what.place == "centre" else f"near the {what.place} edge"
        seen = (
            f"The picture shows {_a(name)} and nothing else, a single subject of the {what.subject.category} group. "
            f"The {name} {_is(name)} placed {where}; the subject is {what.size} and {extent}."
        )
    parts = [seen, ground, style] if rng.random() < 0.5 else [seen, style, ground]
    return " ".join(parts)


def captions(what: Scene) -> dict[str, str]:
    """The three captions of a scene: `short`, `tags`, `long`."""
    return {"short": short_caption(what), "tags": tags_caption(what), "long": long_caption(what)}


def pencil(picture: Image.Image) -> Image.Image:
    """Dark pencil outlines on white paper: a picture divided by its own blurred self leaves the edges."""
    grey = ImageOps.grayscale(picture)
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(picture.width / 64))
    base, veil = np.asarray(grey, np.float32), np.asarray(blurred, np.float32)
    dodged = np.minimum(255.0, base * 255.0 / np.maximum(255.0 - veil, 1.0))
    ink = np.clip((255.0 - dodged) / 255.0 * 3.0, 0.0, 1.0)[..., None]
    paper, lead = np.array(COLOURS["white"], np.float64), np.array([48.0, 44.0, 52.0])
    return Image.fromarray((paper * (1 - ink) + lead * ink).round().astype(np.uint8))


def pencil_captions(what: Scene) -> dict[str, str]:
    """True captions of a scene under `pencil`: on white, whatever its colour was.

    The short ones keep to words that the family's text encoders know; others would hide the subject from the model.
    """
    on_white = replace(what, colour="white")
    short, tags = short_caption(on_white), tags_caption(on_white).removesuffix(", emoji")
    drawn = short.rpartition(" on ")[0].rstrip(",")
    long = (
        f"The picture is a pencil drawing of {drawn} on white paper. Only dark outlines are drawn, in one grey lead, "
        "and there is no colour: neither the subject nor the background is filled in, and the paper shows through."
    )
    return {"short": short, "tags": tags, "long": long}


@dataclass(frozen=True)
class Look:
    """An operation on composed pictures and the captions that stay true under it."""

    picture: Callable[[Image.Image], Image.Image]
    captions: Callable[[Scene], dict[str, str]]


LOOKS = {"plain": Look(lambda picture: picture, captions), "pencil": Look(pencil, pencil_captions)}


def write_folder(
    out: Path,
    count: int,
    seed: int,
    *,
    pairs: float = 0.2,
    look: str = "plain",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `count` pictures as an ordinary captioned folder: PNG, side-car .txt (a caption a line), metadata.jsonl.

    Args:
        pairs: share of pictures with two subjects.
        look: a key of `LOOKS`; emoji-base has seen none but "plain".
        progress: called with (done, total) after each picture.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        what = scene(seed, index, pairs=pairs)
        name = f"{seed:04d}-{index:06d}"
        LOOKS[look].picture(render(what)).save(out / f"{name}.png")
        texts = LOOKS[look].captions(what)
        lines = list(texts.values())
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows.append(json.dumps({"file_name": f"{name}.png", "captions": texts}))
        if progress:
            progress(index + 1, count)
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return out
