"""What the emoji family is measured on: pictures that none of its models has seen, and short prompts.

The family's base has been trained on every scene of one subject, each at one fixed spot. So the scenes are drawn from
the tenth that its judge was not trained on, and every subject is moved by one or two pixels along both axes: captions,
subjects and colours stay what they are, and no model has been trained on these pixels or latents. More would leave
what the base knows: its slope at sigma 0.9 is 0.99 unmoved, 0.98 so, and 0.96 when moved by 2 to 6.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from libreflux import seeding
from libreflux.emoji import compose
from libreflux.emoji.build.base import scenes
from libreflux.emoji.build.judge import split
from libreflux.emoji.compose import COLOURS, Scene
from libreflux.emoji.folders import write_captioned

SHIFT = 2  # pixels at most, 1 at least; every subject keeps 2 or more to its edges
JUDGE = Path(compose.__file__).parent / "weights" / "judge.safetensors"


def subject_names() -> tuple[str, ...]:
    """Every subject of the family."""
    return tuple(subject.name for subject in compose.subjects())


def held_out_scenes(count: int) -> list[Scene]:
    """`count` scenes of one subject, subjects as evenly spread as can be; a longer list begins with a shorter one."""
    singles, rows = scenes()[0], split()[1]
    order = seeding.rng(0, "held-out-scenes").permutation(len(rows)).tolist()
    rounds: dict[str, int] = {}
    placed = []
    for position, number in enumerate(order):
        name = singles[rows[number]].subject.name
        rounds[name] = rounds.get(name, 0) + 1
        placed.append((rounds[name], position, rows[number]))
    return [singles[row] for _, _, row in sorted(placed)[:count]]


def moved(what: Scene, index: int) -> Image.Image:
    """A scene's picture, moved by 1 to `SHIFT` pixels along both axes."""
    rng = seeding.rng(0, "held-out-shift", index)
    x, y = (int(rng.choice([-1, 1]) * rng.integers(1, SHIFT + 1)) for _ in range(2))
    picture = Image.new("RGB", (compose.SIDE, compose.SIDE), COLOURS[what.colour])
    picture.paste(compose.render(what), (x, y))
    return picture


def write_held_out(folder: Path, count: int) -> Path:
    """Writes `count` held-out pictures with their short captions, see `write_captioned`."""
    chosen = held_out_scenes(count)
    return write_captioned(folder, [*map(compose.short_caption, chosen)], lambda number: moved(chosen[number], number))


def prompts(count: int) -> list[str]:
    """`count` short prompts "a SUBJECT on COLOUR", every subject before any twice; a longer list begins with these."""
    subjects, colours = compose.subjects(), list(COLOURS)
    found = []
    for index in range(count):
        turn, place = divmod(index, len(subjects))
        subject = subjects[seeding.rng(0, "probe-subjects", turn).permutation(len(subjects))[place]]
        colour = colours[seeding.rng(0, "probe-colour", index).integers(len(colours))]
        found.append(compose.short_caption(Scene(subject, colour, "large", "centre")))
    return found
