"""A model, what it was distilled into before, and what it is to be like, measured alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libreflux.errors import DataError, LibrefluxError
from libreflux.files import atomic_write_json
from libreflux.model.locate import locate
from libreflux.printing import get_logger, printable
from libreflux.probing.freedom import FreedomRow, check_comparable, freedom
from libreflux.probing.no_training import LEAST, NoTraining, no_training
from libreflux.probing.results import FILE, Result, read_result
from libreflux.workflows.probe_measure import measure, out_of, read_model, try_out
from libreflux.workflows.probe_model import ProbedModel
from libreflux.workflows.probe_options import ProbeOptions

logger = get_logger(__name__)

FREEDOM_FILE = "freedom.json"


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        folder: of the model's result.
        result: of the model.
        others: of what it is compared with: the distilled model, then the reference if there is one.
        freedom: how much of the distance between those two the model has closed.
        untrained: how much of it needs no training; None where that cannot be told.
    """

    folder: Path
    result: Result
    others: list[Result]
    freedom: list[FreedomRow]
    untrained: NoTraining | None


def compare(options: ProbeOptions, against: str) -> Comparison:
    """Measures up to three models with equal settings, and writes freedom.json; results that exist are used.

    Args:
        options: of the probe; no `reference` is what the distilled model says it was distilled from, or else theory's
            values.
        against: the distilled model, or a folder that a probe wrote.

    Raises:
        DataError: a result that was measured with other settings.
    """
    model = read_model(options)
    places = {out_of(options, model)}
    results: list[Result] = []
    drawing: list[_Opened] = []
    for name, role in ((against, "against"), (options.reference, "reference")):
        if name is None:
            name = distilled_from(against, results[0])
        if name is not None:
            found = _given(name)
            if found is None:
                one = _opened(options, name, role, places)
                found = one.measured(model.trained_subjects)
                drawing += [one] if role == "against" else []
            results.append(found)
    folder, result = measure(options, model)
    check_comparable([result, *results])
    rows = freedom(result, *results)
    untrained = no_training(result, *results)
    if untrained is None:
        logger.warning(
            "how much of it needs no training is not told: that takes %d pictures or more, and no result of an older "
            "version",
            LEAST,
        )
    elif options.controls:
        control = _drawn_control(drawing, untrained.drawn_w, results[0], model)
        untrained = untrained if control is None else untrained.with_drawn(control, result, *results)
    told = {
        "schema": 1,
        "held_out": [{"model": one.model["name"], **_held_out(one)} for one in (result, *results)],
        "freedom": [row.as_json() for row in rows],
        "no_training": None if untrained is None else untrained.as_json(),
    }
    atomic_write_json(folder / FREEDOM_FILE, told)
    return Comparison(folder, result, results, rows, untrained)


def _held_out(result: Result) -> dict[str, Any]:
    """Whether it was measured on pictures that it was not trained on, None where nobody knows; the rest is its own."""
    trained = None if result.trained is None else result.trained.as_json()
    return {name: None if trained is None else trained[name] for name in ("held_out", "verdict")}


def distilled_from(against: str, distilled: Result) -> str | None:
    """The model that a distilled one says it was distilled from, if that is here; a file's word downloads nothing.

    Args:
        against: what the user named.
        distilled: its result.
    """
    told = distilled.model.get("distilled_from")
    if not isinstance(told, str):
        logger.warning("%s does not say what it was distilled from: compared with theory alone", against)
        return None
    try:
        locate(told, fetch=False)
    except LibrefluxError:
        logger.warning("%s was distilled from %s, which is not here: compared with theory alone", against, told)
        return None
    return told


def _given(name: str) -> Result | None:
    """A result that was named itself."""
    path = Path(name)
    if not (path / FILE).is_file() and path.name != FILE:
        return None
    found = read_result(path)
    folder = path if path.is_dir() else path.parent
    for picture in found.pictures:
        if not (file := folder / picture.file).is_file():
            raise DataError("a picture of this result is missing", where=file, hint="copy the whole folder")
    if any(row.at.get("what") == "both" for row in found.measures):
        logger.warning("%s is of an older libreflux: probe it again to have its accuracy compared", printable(name))
    return found


@dataclass(frozen=True)
class _Opened:
    """Another model, to be measured as the first one is, in a folder that none of them has yet."""

    options: ProbeOptions
    model: ProbedModel

    def measured(self, trained_subjects: tuple[str, ...] | None, weakened: float = 1.0) -> Result:
        """See `measure`."""
        return measure(self.options, self.model, trained_subjects, weakened)[1]


def _opened(options: ProbeOptions, name: str, role: str, places: set[Path]) -> _Opened:
    out = None if options.out is None else Path(options.out) / role
    other = dataclasses.replace(options, model=name, adapters=(), trained_on=(), out=out)
    model = read_model(other)
    own = out_of(other, model)
    if own in places:
        own = own.with_name(f"{own.name}-{model.sha256[:6]}")
        try_out(own)
        other, model = dataclasses.replace(other, out=own), model.kept_in(own)
    places.add(own)
    return _Opened(other, model)


def _drawn_control(drawing: list[_Opened], w: float, distilled: Result, freed: ProbedModel) -> Result | None:
    """What the distilled model draws at guidance w; None where its result alone was named."""
    if w == 1:
        return distilled
    if not drawing:
        logger.warning("drawn measures have no control without training: name the distilled model itself for it")
        return None
    return drawing[0].measured(freed.trained_subjects, w)
