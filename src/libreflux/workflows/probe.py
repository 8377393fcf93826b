"""How free is a model? Measures, pictures, and a page of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from libreflux.places import file_place
from libreflux.probing.freedom import FreedomRow
from libreflux.probing.no_training import NoTraining
from libreflux.probing.report.page import write_page
from libreflux.probing.results import FILE, Result
from libreflux.probing.unit_table import write_table
from libreflux.workflows.keywords import by_keywords
from libreflux.workflows.probe_compare import FREEDOM_FILE, compare
from libreflux.workflows.probe_data import check_quotes
from libreflux.workflows.probe_measure import measure, read_model
from libreflux.workflows.probe_options import ProbeOptions, check_options
from libreflux.workflows.probe_own import own_measures


@dataclass(frozen=True)
class ProbeResult:
    """What was measured.

    Attributes:
        folder: of the result.
        result: of the model.
        page: an HTML page that shows it.
        others: of what it is compared with: the distilled model, then the reference if there is one.
        freedom: how much of the distance between those two the model has closed; None without `against`.
        untrained: how much of it needs no training; None without `against`, and where that cannot be told.
    """

    folder: Path
    result: Result
    page: Path
    others: tuple[Result, ...] = ()
    freedom: tuple[FreedomRow, ...] | None = None
    untrained: NoTraining | None = None

    @property
    def file(self) -> Path:
        """What holds the numbers: freedom.json, or probe.json without `against`."""
        return self.folder / (FILE if self.freedom is None else FREEDOM_FILE)

    @property
    def in_order(self) -> list[Result]:
        """Before, after, and what is aimed at."""
        return _in_order(self.result, self.others)


def probe_with(options: ProbeOptions) -> ProbeResult:
    """Measures how free a model is: loss, calibration, guidance, steps, diversity, padding and negative prompts.

    With a whole CLIP as `features` also how well pictures agree with their prompts, with `ocr` how many letters of
    quoted texts are right. With `against`, also which share of the distance from the distilled model to the reference
    is closed. Interrupted, the same call goes on after the last finished measure.

    Raises:
        OptionError: an option that has no effect, data missing for a model that is not of the emoji family, or `ocr`
            with captions that quote nothing.
        LibrefluxError: a model, adapter, judge or picture that cannot be read, or a folder that cannot be written.

    Example::

        import libreflux

        found = libreflux.probe("emoji-libre", quick=True, pictures=8, prompts=2, guidance=[1], steps=[2, 4])
        for row in found.result.measures:
            print(row.name, row.at, row.value)
        print(found.page)
    """
    check_options(options)
    own_measures(options.measures)  # refused before a model is read
    if options.ocr:
        check_quotes(Path(str(options.data)))
    if options.csv is not None:
        file_place(Path(options.csv))
    found = _measured(options)
    if options.csv is not None:
        write_table(found.in_order, Path(options.csv))
    return found


def _measured(options: ProbeOptions) -> ProbeResult:
    if options.against is None:
        folder, result = measure(options, read_model(options))
        return ProbeResult(folder, result, write_page([result], folder))
    found = compare(options, options.against)
    results = _in_order(found.result, found.others)
    page = write_page(results, found.folder, freedom=found.freedom, untrained=found.untrained)
    return ProbeResult(
        found.folder, found.result, page, tuple(found.others), tuple(found.freedom), untrained=found.untrained
    )


def _in_order(result: Result, others: list[Result] | tuple[Result, ...]) -> list[Result]:
    return [*others[:1], result, *others[1:]]


probe = by_keywords(ProbeOptions, probe_with)
