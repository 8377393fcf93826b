"""`probe --against`: a model, what it was distilled into before, and what it is to be like, measured alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from libreflux.cli.probing import PROBES, Request, run, subject_of, try_out
from libreflux.errors import DataError, LibrefluxError
from libreflux.files import atomic_write_json
from libreflux.model.locate import locate
from libreflux.printing import get_logger
from libreflux.probing.freedom import FreedomRow, check_comparable, freedom
from libreflux.probing.results import FILE, Result, read_result

logger = get_logger(__name__)

FREEDOM_FILE = "freedom.json"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found.

    Attributes:
        folder: of the model's result.
        result: of the model.
        others: of what it is compared with: the distilled model, then the reference if there is one.
        freedom: how much of the distance between those two the model has closed.
    """

    folder: Path
    result: Result
    others: list[Result]
    freedom: list[FreedomRow]

    @property
    def in_order(self) -> list[Result]:
        """Before, after, and what is aimed at."""
        return [*self.others[:1], self.result, *self.others[1:]]


def compare(request: Request, against: str, reference: str | None) -> Comparison:
    """Probes up to three models with equal settings; results that exist are used.

    Args:
        request: of the model.
        against, reference: models, or folders that `probe` wrote; no reference: what the distilled model says it was
            distilled from, or else theory's values.

    Raises:
        DataError: a result that was measured with other settings.
    """
    if request.out is not None:
        try_out(request.out)
    subject = subject_of(request)
    try_out(request.out or PROBES / subject.slug)
    places = {request.out or PROBES / subject.slug}
    results: list[Result] = []
    for name, where in ((against, "against"), (reference, "reference")):
        if name is None and results:
            name = _origin(against, results[0])
        if name is None:
            continue
        found = _given(name)
        if found is None:
            found = _probe(
                dataclasses.replace(request, model=name, adapters=(), told_seen=subject.trained_subjects), where, places
            )
        results.append(found)
    folder, result = run(request)
    check_comparable([result, *results])
    rows = freedom(result, *results)
    atomic_write_json(folder / FREEDOM_FILE, {"schema": 1, "freedom": [row.as_json() for row in rows]})
    return Comparison(folder=folder, result=result, others=results, freedom=rows)


def _given(name: str) -> Result | None:
    """A result that was named itself."""
    path = Path(name)
    if not (path / FILE).is_file() and path.name != FILE:
        return None
    found = read_result(path)
    for picture in found.pictures:
        assert found.folder is not None
        if not (file := found.folder / picture.file).is_file():
            raise DataError("a picture of this result is missing", where=file, hint="copy the whole folder")
    return found


def _probe(request: Request, role: str, places: set[Path]) -> Result:
    subject = subject_of(request)
    out = PROBES / subject.slug if request.out is None else request.out / role
    if out in places:
        out = out.with_name(f"{out.name}-{subject.sha256[:6]}")
    places.add(out)
    return run(dataclasses.replace(request, out=out))[1]


def _origin(against: str, distilled: Result) -> str | None:
    """What the distilled model says it was distilled from, if that is here."""
    told = distilled.model.get("distilled_from")
    if not isinstance(told, str):
        logger.warning("%s does not say what it was distilled from: compared with theory alone", against)
        return None
    try:
        locate(told, fetch=False)  # a file's word: nothing is downloaded for it
    except LibrefluxError:
        logger.warning("%s was distilled from %s, which is not here: compared with theory alone", against, told)
        return None
    return told
