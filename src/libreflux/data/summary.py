"""What a source turned out to hold, in two lines that show a wrong layout before hours are spent on it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from libreflux.data.crops import View, crop_window
from libreflux.data.folders import Unread
from libreflux.data.sources import Sample, SourceRead
from libreflux.printing import counted, printable, readable
from libreflux.recipe import DataSource

WORTH_TELLING = 0.02  # share of the pixels that crops leave out


@dataclass(frozen=True)
class Cropped:
    """What no crop shows: of each view the centred crop counts, of several views the mean.

    Attributes:
        share: of all pixels, in [0, 1).
        most: of one picture.
        file: that picture.
    """

    share: float = 0.0
    most: float = 0.0
    file: str = ""


@dataclass(frozen=True)
class SourceSummary:
    """One source of a recipe.

    Attributes:
        path: as the recipe has it.
        pictures: usable ones, each once.
        captions: of them.
        origins: captions by where they stand: ".txt", a column of metadata.jsonl, "folder name".
        repeats: kohya folders and how often an epoch shows their pictures.
        shown: how many pictures an epoch shows in each view, on average.
        too_small: pictures that min_size leaves out.
        unusable: pictures that are quarantined.
        unread: files that nothing reads, by suffix.
        left_out: folders of runs and caches, as seen from its folder.
        cropped: what crops leave out.
        example: a picture and its first caption; None without a picture.
    """

    path: str
    pictures: int
    captions: int
    origins: Mapping[str, int]
    repeats: Mapping[str, int]
    shown: float
    too_small: int
    unusable: int
    unread: Sequence[Unread]
    left_out: Sequence[str]
    cropped: Cropped
    example: tuple[Path, str] | None

    def lines(self, width: int = 400) -> list[str]:
        """What to print: the counts, in lines of `width` characters, and one caption, cut to a line."""
        told = [f"{counted(self.pictures, 'picture')}, {counted(self.captions, 'caption')}{self._where}"]
        told += [f"{self.unusable} unusable"] if self.unusable else []
        told += [f"{self.too_small} smaller than min_size"] if self.too_small else []
        told += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        unread = [f"{one.count} {one.suffix or one.first.name}" for one in self.unread]
        told += [f"not read: {', '.join(unread)}"] if unread else []
        told += [f"{name} shown {times} times an epoch" for name, times in self.repeats.items() if times > 1]
        told += [f"{readable(self.shown)} shown an epoch"] if self.shown != self.pictures else []
        if self.cropped.share >= WORTH_TELLING or self.cropped.most >= 0.5:
            worst = f" ({self.cropped.most:.0%} of {Path(self.cropped.file).name})"
            told += [f"{self.cropped.share:.0%} of the pixels cropped off{worst}"]
        text = printable(f"{self.path}: {', '.join(told)}")
        lines = textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        if self.example is not None:
            lines.append(_cut(f"  {self.example[0].name}: {self.example[1]!r}", width))
        return lines

    @property
    def _where(self) -> str:
        return f" ({', '.join(f'{name} {count}' for name, count in self.origins.items())})" if self.origins else ""


Told = Callable[[SourceSummary], None]


def summarise(source: DataSource, found: SourceRead, views: Sequence[View]) -> SourceSummary:
    """What to tell of a source.

    Args:
        source: its path, repeats and weight are used.
        found: what its folder holds.
        views: in which training shows it.
    """
    samples = found.samples
    example = min(samples, key=lambda sample: sample.file, default=None)
    return SourceSummary(
        path=source.path,
        pictures=len(samples),
        captions=sum(len(sample.captions) for sample in samples),
        origins=found.origins,
        repeats=found.repeats,
        shown=source.repeats * source.weight * sum(sample.repeats for sample in samples),
        too_small=sum(one.too_small for one in found.quarantined),
        unusable=sum(not one.too_small for one in found.quarantined),
        unread=sorted(found.folder.unread.values(), key=lambda one: (-one.beside, -one.count, one.suffix)),
        left_out=[os.path.relpath(one, os.path.expanduser(source.path)) for one in found.folder.left_out],
        cropped=cropped(samples, views),
        example=None if example is None else (example.path, example.captions[0]),
    )


def cropped(samples: Sequence[Sample], views: Sequence[View]) -> Cropped:
    """The share of their pixels that the centred crops of these views leave out."""
    by_size: dict[tuple[int, int], float] = {}  # of a million pictures few have a size of their own
    total = lost = 0.0
    worst = Cropped()
    for sample in samples:
        share = by_size.get(sample.size)
        if share is None:
            share = by_size[sample.size] = sum(_left_out(sample.size, view) for view in views) / len(views)
        pixels = sample.size[0] * sample.size[1]
        total, lost = total + pixels, lost + share * pixels
        if share > worst.most:
            worst = Cropped(most=share, file=sample.file)
    return Cropped(lost / total if total else 0.0, worst.most, worst.file)


def _left_out(size: tuple[int, int], view: View) -> float:
    left, top, right, bottom = crop_window(*size, view.size(*size))
    return 1 - (right - left) * (bottom - top) / (size[0] * size[1])


def _cut(line: str, width: int) -> str:
    plain = "".join(letter if letter.isprintable() else "?" for letter in " ".join(line.split("\n")))
    return plain if len(plain) <= width else plain[: max(0, width - 1)] + "…"
