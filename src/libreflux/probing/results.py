"""What a probe found, as `probe.json` keeps it: every measure with its interval and replicates, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libreflux import plainjson
from libreflux.errors import DataError
from libreflux.files import atomic_write_json
from libreflux.probing.trained import TrainingCheck
from libreflux.probing.units import Units

SCHEMA = 1
FILE = "probe.json"
Coordinate = str | float
PURPOSES = ("guidance", "steps", "seeds", "negative", "padding", "nearest", "letters")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number and how far it can be trusted. What is not finite is NaN here and null in the file.

    Attributes:
        name: what is measured.
        at: where, e.g. {"sigma": 0.5, "text": "caption"}.
        subset: "all", "seen" or "unseen".
        value: over all units of the subset.
        low, high: ends of the 95 % interval.
        replicates: bootstrap replicates; the r-th of two models over equal units is of the same resampling.
        reference: the value that theory says a free model has, None where it says none.
        unit: of the value.
        count: of pictures or prompts that it is counted over; None in older results.
        units: what it is made of, over all of them; None where it is no ratio of sums, and in older results.
    """

    name: str
    at: Mapping[str, Coordinate]
    subset: str
    value: float
    low: float
    high: float
    replicates: Sequence[float]
    reference: float | None = None
    unit: str = ""
    count: int | None = None
    units: Units | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, in the order of the file."""
        rows = {
            "name": self.name,
            "at": dict(self.at),
            "subset": self.subset,
            "value": _plain(self.value),
            "low": _plain(self.low),
            "high": _plain(self.high),
            "replicates": [_plain(value) for value in self.replicates],
            "reference": self.reference,
            "unit": self.unit,
            "count": self.count,
        }
        return rows | ({} if self.units is None else {"units": self.units.as_json()})

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Measure:
        """The inverse of `as_json`."""
        numbers: dict[str, Any] = {name: _number(row[name]) for name in ("value", "low", "high")}
        numbers["replicates"] = [_number(value) for value in row["replicates"]]
        kept = {name: row[name] for name in ("name", "at", "subset", "reference", "unit")}
        units = row.get("units")
        return Measure(
            **kept, **numbers, count=row.get("count"), units=None if units is None else Units.from_json(units)
        )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn picture: its file, relative to the result's folder, how it was drawn, and what it is to show."""

    file: str
    at: Mapping[str, Coordinate]
    purpose: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"file": self.file, "at": dict(self.at), "purpose": self.purpose}

    @staticmethod
    def from_json(row: Mapping[str, Any], folder: Path) -> Picture:
        """The inverse of `as_json`, of a result in `folder`.

        Raises:
            ValueError: a file outside the folder, links followed, or none that a probe writes: a page would show it.
        """
        found = Picture(**row)
        if not isinstance(found.file, str) or Path(found.file).suffix != ".png":
            raise ValueError(f"{found.file!r} is no .png file")
        if not (folder / found.file).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{found.file!r} is outside its folder")
        return found


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that was found of one model.

    Attributes:
        model: name, sha256, adapters, steps, guidance, text_padding.
        settings: whatever decides the numbers.
        versions: package to version.
        seconds: that the measuring took.
        measures: the numbers.
        pictures: what they were seen on, a few of them.
        trained: what of the measured pictures it was trained on, None where nothing is known of its training.
        names: of the units that measures count: ids of "pictures", their "captions", and "prompts".
        folder: where its pictures' files are; not part of the file.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    measures: list[Measure] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    trained: TrainingCheck | None = None
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 3),
            "measures": [one.as_json() for one in self.measures],
            "pictures": [one.as_json() for one in self.pictures],
            "trained": None if self.trained is None else self.trained.as_json(),
            "names": {what: list(names) for what, names in self.names.items()},
        }

    @property
    def remark(self) -> str:
        """What a title adds: that it was measured on pictures that are not held out; else ""."""
        return "" if self.trained is None else self.trained.remark

    def find(self, name: str, subset: str = "all", **at: Coordinate) -> Measure | None:
        """The measure of this name at exactly this place, None if there is none."""
        rows = (one for one in self.measures if one.name == name and one.subset == subset)
        return next((one for one in rows if dict(one.at) == at), None)


def write_result(folder: Path, result: Result) -> Path:
    """Writes `folder/probe.json`, atomically."""
    atomic_write_json(folder / FILE, result.as_json())
    return folder / FILE


def read_result(folder: Path) -> Result:
    """Reads `folder/probe.json`, or the file itself.

    Raises:
        DataError: no such file, or not a probe's result.
    """
    path = folder / FILE if folder.is_dir() else folder
    hint = "give a folder that `libreflux probe` wrote"
    try:
        rows = plainjson.parse(path.read_text(encoding="utf-8"))
        if rows["schema"] != SCHEMA:
            raise DataError(f"schema {rows['schema']!r} is not {SCHEMA}", where=path, hint="update libreflux")
        trained = rows.get("trained")  # older results have none
        return Result(
            trained=None if trained is None else TrainingCheck.from_json(trained),
            **{name: rows[name] for name in ("model", "settings", "versions", "seconds")},
            measures=[Measure.from_json(row) for row in rows["measures"]],
            pictures=[Picture.from_json(row, path.parent) for row in rows["pictures"]],
            names={what: [str(name) for name in names] for what, names in rows.get("names", {}).items()},
            folder=path.parent,
        )
    except FileNotFoundError:
        raise DataError("no such file", where=path, hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"no result of a probe ({type(error).__name__}: {error})", where=path, hint=hint) from None


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
