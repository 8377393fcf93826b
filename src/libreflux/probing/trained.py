"""Whether the measured pictures are held out, as `probe.json` keeps it, and the training pictures nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from libreflux.printing import counted

NEAR = 2.0
"""Of 255, by pixels: a picture that was saved again as JPEG is nearer to itself, as a rule."""
MOVED = 2.0
"""A scene that a family says is no farther from one that was trained on is that one, moved."""
IN_CACHE = "cache"


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """The nearest one of what a model was trained on.

    Attributes:
        name: its file's name, or what the scene shows.
        distance: of pixels the mean absolute difference of 32 x 32 thumbnails, 0 to 255; of content see
            `TrainingCheck.content`; of scenes what their family measures by.
        id: of the picture; "" of a scene.
    """

    name: str
    distance: float
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class PictureCheck:
    """One measured picture.

    Attributes:
        id: see `data.sources.Sample`.
        name: its file's name.
        seen: "file": these bytes were trained on; "pixels": this very crop, of another file; "latents": a crop of the
            same latents; "scene": what it was composed from; "cache": it is in a cache that the user named, and
            nothing says what was trained on; None: none of these.
        pixels, content, scene: the nearest by each; None where that is not known.
    """

    id: str
    name: str
    seen: str | None
    pixels: Neighbour | None = None
    content: Neighbour | None = None
    scene: Neighbour | None = None

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> PictureCheck:
        """The inverse of `dataclasses.asdict`."""
        near = {name: None if row[name] is None else Neighbour(**row[name]) for name in ("pixels", "content", "scene")}
        return PictureCheck(id=str(row["id"]), name=str(row["name"]), seen=row["seen"], **near)


@dataclass(frozen=True, kw_only=True)
class SetCheck:
    """A set of training pictures.

    Attributes:
        name: as the user knows it.
        pictures: how many are known.
        compared: how many of them have a file whose pixels were compared.
        trained: whether they are known to be trained on; False: a cache holds them.
        whole: False where there may be more than what is known or could be read.
    """

    name: str
    pictures: int
    compared: int
    trained: bool = True
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingCheck:
    """What is known of a model's training pictures, against those that it is measured on.

    Attributes:
        rows: one for each measured picture.
        sets: what it was trained on.
        scenes: whether its family knows the scenes that it was trained on.
        content: "judge": 1 - cosine of the judge's features; "latents": root mean square of latents' differences; None.
        unknown: adapters and runs of which nobody knows what they were trained on.
    """

    rows: Sequence[PictureCheck]
    sets: Sequence[SetCheck]
    scenes: bool = False
    content: str | None = None
    unknown: Sequence[str] = ()

    @property
    def seen(self) -> int:
        """How many of the measured pictures were trained on."""
        return sum(row.seen not in (None, IN_CACHE) for row in self.rows)

    @property
    def cached(self) -> int:
        """How many more are in a cache of which nothing says what was trained on."""
        return sum(row.seen == IN_CACHE for row in self.rows)

    @property
    def near(self) -> int:
        """How many of the others are so near to a training picture that they may be copies of it, see `NEAR`."""
        return sum(row.seen is None and row.pixels is not None and row.pixels.distance <= NEAR for row in self.rows)

    @property
    def moved(self) -> int:
        """How many of the others show a scene that was trained on, only moved a little, see `MOVED`."""
        return sum(row.seen is None and row.scene is not None and row.scene.distance <= MOVED for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether all that was trained on is known and was compared by its pixels, but for the base's own training."""
        whole = all(one.whole and one.compared == one.pictures for one in self.sets)
        return whole and not self.unknown and bool(self.sets or self.scenes)

    @property
    def held_out(self) -> bool | None:
        """False: some are not. True only of a family that knows all of its training; else nobody knows the base's."""
        if self.seen:
            return False
        asked = self.scenes and all(row.scene is not None for row in self.rows)
        return True if asked and self.complete and not (self.cached or self.near or self.moved) else None

    @property
    def remark(self) -> str:
        """What a title adds: which pictures are not held out, or may not be; "" where none is known to be."""
        of, told = f"of {counted(len(self.rows), 'picture')}", []
        if self.seen:
            told.append(f"not held out: {self.seen:,} {of} {'was' if self.seen == 1 else 'were'} trained on")
        if self.cached:
            caches = ", ".join(one.name for one in self.sets if not one.trained)
            verb = "is" if self.cached == 1 else "are"
            told.append(f"{self.cached:,} {of} {verb} in {caches}, and what was trained on of that is not known")
        if self.near:
            verb = "has" if self.near == 1 else "have"
            told.append(f"{self.near:,} {of} {verb} a training picture within {NEAR:g} of 255")
        if self.moved:
            verb = "shows" if self.moved == 1 else "show"
            told.append(f"{self.moved:,} {of} {verb} a scene that was trained on, moved by {MOVED:g} pixels at most")
        return "; ".join(told)

    @property
    def verdict(self) -> str:
        """One line."""
        against = [_against(one) for one in self.sets]
        against += ["its family's training scenes"] if self.scenes else []
        if self.seen:
            return self.remark
        if not against:
            return f"not known to be held out: what was trained on is not known{_among(self.unknown)}"
        told = [] if self.cached else [f"none of {counted(len(self.rows), 'picture')} is in {', '.join(against)}"]
        told += [self.remark] if self.remark else []
        if torn := [one.name for one in self.sets if not one.whole]:
            told.append(f"not all of {', '.join(torn)} is known")
        if self.unknown:
            told.append(f"not known: {', '.join(self.unknown)}")
        return "; ".join(told)

    def distances(self, kind: str) -> np.ndarray:
        """[n] fp64 distances to the nearest by "pixels", "content" or "scene", of the pictures that have one."""
        near: list[Neighbour | None] = [getattr(row, kind) for row in self.rows]
        return np.array([one.distance for one in near if one is not None], np.float64)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "held_out": self.held_out,
            "verdict": self.verdict,
            "pictures": len(self.rows),
            "seen": self.seen,
            "cached": self.cached,
            "near": self.near,
            "moved": self.moved,
            "complete": self.complete,
            "sets": [asdict(one) for one in self.sets],
            "scenes": self.scenes,
            "content": self.content,
            "unknown": list(self.unknown),
            "rows": [asdict(row) for row in self.rows],
        }

    @staticmethod
    def from_json(told: Mapping[str, Any]) -> TrainingCheck:
        """The inverse of `as_json`."""
        return TrainingCheck(
            rows=[PictureCheck.from_json(row) for row in told["rows"]],
            sets=[SetCheck(**row) for row in told["sets"]],
            scenes=bool(told["scenes"]),
            content=told["content"],
            unknown=[str(name) for name in told["unknown"]],
        )


def _against(one: SetCheck) -> str:
    by_pixels = "" if one.compared == one.pictures else f", {one.compared:,} of them compared by pixels"
    return f"{one.name} ({counted(one.pictures, 'picture')}{by_pixels})"


def _among(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
