"""Whether the measured pictures are held out, as `probe.json` keeps it, and the training pictures nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from libreflux.printing import counted


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
        seen: "file": these bytes were trained on; "pixels": this very crop, of another file; "scene": what it was
            composed from; None: none of these.
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
    """A set of training pictures: how many it has, and how many of them have a file whose pixels were compared."""

    name: str
    pictures: int
    compared: int


@dataclass(frozen=True, kw_only=True)
class TrainingCheck:
    """What is known of a model's training pictures, against those that it is measured on.

    Attributes:
        rows: one for each measured picture.
        sets: what it was trained on.
        scenes: whether its family knows the scenes that it was trained on.
        content: "judge": 1 - cosine of the judge's features; "latents": root mean square of latents' differences; None.
        unknown: adapters of which nobody knows what they were trained on.
    """

    rows: Sequence[PictureCheck]
    sets: Sequence[SetCheck]
    scenes: bool = False
    content: str | None = None
    unknown: Sequence[str] = ()

    @property
    def seen(self) -> int:
        """How many of the measured pictures were trained on."""
        return sum(row.seen is not None for row in self.rows)

    @property
    def remark(self) -> str:
        """What a title adds: that the pictures are not held out; "" where none is known to be trained on."""
        if not self.seen:
            return ""
        were = "was" if self.seen == 1 else "were"
        return f"not held out: {self.seen:,} of {counted(len(self.rows), 'picture')} {were} trained on"

    @property
    def verdict(self) -> str:
        """One clause."""
        against = [f"{one.name} ({counted(one.pictures, 'picture')})" for one in self.sets]
        against += ["its family's training scenes"] if self.scenes else []
        if self.remark:
            return self.remark
        if not against:
            return "not known to be held out: what was trained on is not known"
        known = f"none of {counted(len(self.rows), 'picture')} is in {', '.join(against)}"
        return known if not self.unknown else f"{known}; not known: {', '.join(self.unknown)}"

    def distances(self, kind: str) -> np.ndarray:
        """[n] fp64 distances to the nearest by "pixels", "content" or "scene", of the pictures that have one."""
        near: list[Neighbour | None] = [getattr(row, kind) for row in self.rows]
        return np.array([one.distance for one in near if one is not None], np.float64)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "held_out": False if self.seen else (None if self.unknown or not (self.sets or self.scenes) else True),
            "verdict": self.verdict,
            "pictures": len(self.rows),
            "seen": self.seen,
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
