"""The new sets of benchmarks/keep_steps.py, and what it draws besides: captioned folders and prompts of a family."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from libreflux import seeding
from libreflux.data.folders import walk
from libreflux.emoji import compose, held_out
from libreflux.emoji.artists import captions, scenes
from libreflux.emoji.artists.held_out import held_out_scene, training_scene
from libreflux.files import staged_dir

Scene = tuple[Image.Image, str]
"""A picture and its caption."""
PENCIL = ", in pencil"
"""What captions of the look say. Other prompts do not: the look need not change what they draw."""


@dataclass(frozen=True)
class NewSet:
    """One thing to learn.

    Attributes:
        name: look, subjects or other.
        train: folder that is trained on.
        new: folder of the same kind that is not: what is learnt is measured on it.
    """

    name: str
    train: Path
    new: Path


@dataclass(frozen=True)
class Family:
    """What a family of models was trained on, and what it lacks.

    Attributes:
        plain: index → a scene as it was trained on.
        subject: index → a scene of a subject that it never saw; None where there is none.
        prompts: so many short prompts.
    """

    plain: Callable[[int], Scene]
    subject: Callable[[int], Scene] | None
    prompts: Callable[[int], list[str]]


def _emoji(index: int) -> Scene:
    what = compose.scene(41, index, pairs=0.0)
    return compose.render(what), compose.short_caption(what)


def _artists(index: int) -> Scene:
    what = training_scene(41, index, pairs=0.0)
    return scenes.render(what), captions.captions(what)["short"]


def _artists_subject(index: int) -> Scene:
    what = held_out_scene("subject", 41, index)
    return scenes.render(what), captions.captions(what)["short"]


def _artists_prompts(count: int) -> list[str]:
    found = (captions.captions(training_scene(43, index, pairs=0.0))["short"] for index in range(64 * count))
    return list(dict.fromkeys(found))[:count]


FAMILIES = {
    "emoji": Family(_emoji, None, held_out.prompts),
    "artists": Family(_artists, _artists_subject, _artists_prompts),
}


def new_sets(
    work: Path, family: Family, names: Sequence[str], folders: dict[str, Path | None], count: int
) -> Iterator[NewSet]:
    """Makes those that are not there: `count` pictures to train on, and as many to measure on.

    Args:
        work: where to.
        family: of the models.
        names: of the sets.
        folders: captioned folders by the sets' names, in place of what the family makes.
        count: pictures of each half.

    Raises:
        SystemExit: a set that nobody has.
    """
    for name in names:
        found = NewSet(name, work / "sets" / name / "train", work / "sets" / name / "new")
        given = folders.get(name)
        if given is not None:
            _halves(given, found, count)
        elif name == "look":
            _write(found, count, lambda index: _pencil(family.plain(index)))
        elif name == "subjects" and family.subject is not None:
            _write(found, count, family.subject)
        else:
            raise SystemExit(f"nobody has the set {name} for this family: name a captioned folder with --{name}")
        yield found


def plain_folder(work: Path, family: Family, count: int) -> Path:
    """Real pictures of what the family was trained on."""
    return write_folder(work / "real", (family.plain(10_000 + index) for index in range(count)))


def write_folder(out: Path, rows: Iterator[Scene]) -> Path:
    """A captioned folder, unless it is there."""
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged_dir(out) as staging:
            for index, (picture, caption) in enumerate(rows):
                picture.save(staging / f"{index:04d}.png")
                (staging / f"{index:04d}.txt").write_text(caption + "\n", encoding="utf-8")
    return out


def _pencil(scene: Scene) -> Scene:
    return compose.pencil(scene[0]), f"{scene[1]}{PENCIL}"


def _write(found: NewSet, count: int, made: Callable[[int], Scene]) -> None:
    write_folder(found.train, (made(index) for index in range(count)))
    write_folder(found.new, (made(count + index) for index in range(count)))


def _halves(folder: Path, found: NewSet, count: int) -> None:
    """The pictures of a folder with their captions, in two halves that share none."""
    pictures = [path for path in sorted(walk(folder).pictures) if path.with_suffix(".txt").is_file()]
    if len(pictures) < 8:
        raise SystemExit(f"{folder} has {len(pictures)} pictures with a .txt beside them: 8 are needed")
    order = seeding.rng(0, "keep-steps").permutation(len(pictures)).tolist()
    half = min(count, len(pictures) // 2)
    for out, rows in ((found.train, order[:half]), (found.new, order[half : 2 * half])):
        if out.is_dir():
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged_dir(out) as staging:
            for number, row in enumerate(rows):
                for suffix in (pictures[row].suffix, ".txt"):
                    shutil.copyfile(pictures[row].with_suffix(suffix), staging / f"{number:04d}{suffix}")
