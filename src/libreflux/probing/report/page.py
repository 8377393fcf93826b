"""The page of a probe: one HTML file that tells what was found of one model to five, and shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from libreflux import __version__
from libreflux.errors import DataError
from libreflux.files import atomic_write_text
from libreflux.probing.freedom import OVER_SIGMA, FreedomRow, check_comparable
from libreflux.probing.no_training import NoTraining
from libreflux.probing.report import few, html, letters, no_training, plots, trained
from libreflux.probing.report.headlines import headlines
from libreflux.probing.report.labels import MEANINGS, figure, number, place, title
from libreflux.probing.report.pictures import Grid, grids
from libreflux.probing.results import Measure, Result

FILE = "index.html"
MODELS = 5
PICTURE_BYTES = 1_600_000
QUALITIES = ((256, 85), (192, 80), (160, 70), (128, 60), (96, 40), (64, 30))
"""Side in pixels and JPEG quality, the first at which all pictures are within `PICTURE_BYTES`."""
WHAT_IT_IS = """
<p>A text-to-image model turns noise into a picture, step by step. A <b>distilled</b> model has been trained to need
very few steps, and pays for it: its answers are exaggerated, so that <b>guidance</b> (being pushed to follow the
prompt) burns its pictures, seeds give nearly the same one, and it is hard to train further. To set it <b>free</b> is to
undo that. This page measures how much of it is there; every number is from pictures and prompts that are the same for
all models, and the numbers in brackets are its 95 % interval.</p>"""


def write_page(
    results: Sequence[Result],
    out: Path,
    *,
    freedom: Sequence[FreedomRow] = (),
    untrained: NoTraining | None = None,
    labels: Sequence[str] = (),
    title: str = "",
    before: str = "",
    after: str = "",
) -> Path:
    """Writes a self-contained page: equal results give equal bytes, nothing is loaded from anywhere, no script runs.

    Args:
        results: of 1–5 models, measured alike, in the order they are shown; their pictures are in their `folder`s.
        out: the file, or the folder that gets an `index.html`.
        freedom: of one of the models.
        untrained: how much of it needs no training.
        labels: what the models are called, () for their own names.
        title: in place of the question.
        before, after: HTML above and below what was found.

    Returns:
        The page.

    Raises:
        DataError: results that were not measured alike, or a picture that is missing or unreadable.
    """
    if not 1 <= len(results) <= MODELS or len(labels) not in (0, len(results)):
        raise ValueError(f"{len(results)} results, {len(labels)} labels")
    check_comparable(results)
    names = list(labels) or model_labels(results)
    heading = title or (
        f"How free is {names[0]}?" if len(names) == 1 else f"How free are {', '.join(names[:-1])} and {names[-1]}?"
    )
    if remark := trained.remarks(results, names):
        heading = f"{heading} ({remark})"
    first, *others = headlines(results, names, freedom) or [""]
    lines = [trained.warning(results, names), first, no_training.sentence(untrained), *others]
    lines.append(escape(few.warning(results)))
    found = "".join(f"<li>{one}</li>" for one in lines if one)
    shown = grids(results)
    sources = _embedded(
        {
            *(file for grid in shown for row in grid.rows for file in row if file),
            *letters.files(results),
            *trained.files(results),
        }
    )
    body = "\n".join(
        [
            f"<h1>{escape(heading)}</h1>{WHAT_IT_IS}{before}",
            f'<h2>What was found</h2><ul class="found">{found}</ul>' if found else "",
            _pictures(shown, names, sources),
            letters.section(results, names, sources),
            trained.section(results, names, sources),
            _plots(results, names),
            _freedom(freedom, untrained, _family(results)),
            _measures(results, names),
            _settings(results, names),
            after,
            f'<p class="faint">libreflux {__version__}</p>',
        ]
    )
    page = out if out.suffix == ".html" else out / FILE
    atomic_write_text(page, html.document(heading, body))
    return page


def model_labels(results: Sequence[Result]) -> list[str]:
    """Each model's name with its adapters; of equal ones, with digits of what tells them apart."""
    found = []
    for one in results:
        adapters = one.model.get("adapters") or []
        weights = [f" × {row['weight']:g}" if row["weight"] != 1 else "" for row in adapters]
        names = [f"{row['name']}{weight}" for row, weight in zip(adapters, weights, strict=True)]
        name = str(one.model["name"])
        found.append(" + ".join([name if name.count("/") < 2 else Path(name).name, *names]))
    for name in [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        for index, one in enumerate(results):
            if found[index] == name:
                last = (one.model.get("adapters") or [one.model])[-1]
                found[index] = f"{name} ({str(last.get('sha256', index))[:6]})"
    return found


def _pictures(found: Sequence[Grid], names: Sequence[str], sources: Mapping[Path, bytes]) -> str:
    if not found:
        return ""
    return f'<h2>Pictures</h2><div class="grids">{"".join(_grid(grid, names, sources) for grid in found)}</div>'


def _grid(grid: Grid, names: Sequence[str], sources: Mapping[Path, bytes]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in grid.heads)
    lines = []
    for name, remark, row in zip(names, grid.remarks, grid.rows, strict=True):
        alts = [f"{name}, {grid.prompt}, {head}" for head in grid.heads]
        cells = "".join(
            f"<td>{'' if file is None else html.image(sources[file], alt, 'jpeg')}</td>"
            for file, alt in zip(row, alts, strict=True)
        )
        small = f'<br><span class="faint">{escape(remark)}</span>' if remark else ""
        lines.append(f"<tr><th>{escape(name)}{small}</th>{cells}</tr>")
    return (
        f"<div><h3>{escape(grid.what)}: “{escape(grid.prompt)}”</h3>"
        f'<table class="pictures"><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'
    )


def _embedded(files: set[Path]) -> dict[Path, bytes]:
    pictures = {}
    for path in sorted(files):
        try:
            with Image.open(path, formats=["PNG"]) as opened:
                pictures[path] = opened.convert("RGB")
        except OSError as error:
            hint = "probe the model again, into the same folder"
            raise DataError(f"no readable picture ({type(error).__name__})", where=path, hint=hint) from None
    sources: dict[Path, bytes] = {}
    for side, quality in QUALITIES:
        sources = {path: html.jpeg(picture, side, quality) for path, picture in pictures.items()}
        if sum(map(len, sources.values())) <= PICTURE_BYTES:
            break
    return sources


def _plots(results: Sequence[Result], names: Sequence[str]) -> str:
    rungs = any(one.settings.get("rungs") for one in results)
    noise = "noise level sigma (0 picture, 1 noise)"
    by_sigma, by_scale = {"text": "caption"}, {"what": "all"}
    drawn = [
        plots.lines(
            _series(results, names, "loss", "sigma", by_sigma),
            title="Error on the measured pictures (lower is better)",
            x=noise,
            y="loss, MSE",
        ),
        plots.lines(
            _series(results, names, "slope", "sigma", by_sigma),
            title="Calibration (1 is right)",
            x=noise,
            y="slope k",
            level=1.0,
        ),
        plots.lines(
            _series(results, names, "accuracy", "guidance", by_scale),
            title="Pictures that show what was asked for",
            x="guidance",
            y="accuracy",
            percent=True,
        ),
        plots.lines(
            _series(results, names, "agreement", "guidance", {}),
            title="Agreement of pictures and prompts (higher is better)",
            x="guidance",
            y="cosine",
        ),
        plots.lines(
            _series(results, names, "letters", "guidance", {}),
            title="Letters of quoted texts that are right",
            x="guidance",
            y="letters right",
            percent=True,
        ),
        plots.lines(
            _series(results, names, "clipped", "guidance", {}),
            title="Burnt colours (lower is better)",
            x="guidance",
            y="clipped values",
            percent=True,
        ),
    ]
    if not any(drawn):
        return ""
    ladder = " Hollow marks: noise levels of a few-step model's own steps." if rungs else ""
    note = f'<p class="faint">Bands: 95 % intervals.{ladder}</p>'
    return f'<h2>By noise level and guidance</h2>{note}<div class="plots">{"".join(drawn)}</div>'


def _series(
    results: Sequence[Result],
    names: Sequence[str],
    measure: str,
    along: str,
    rest: Mapping[str, str],
) -> list[plots.Series]:
    found = []
    for index, (one, name) in enumerate(zip(results, names, strict=True)):
        rows = [row for row in one.measures if row.name == measure and row.subset == "all" and along in row.at]
        kept = [row for row in rows if {key: at for key, at in row.at.items() if key != along} == rest]
        points = sorted((float(row.at[along]), row.value, row.low, row.high) for row in kept)
        found.append(plots.Series(name, index, points, one.settings.get("rungs") or ()))
    return found


def _freedom(rows: Sequence[FreedomRow], untrained: NoTraining | None, family: str) -> str:
    if not rows:
        return ""
    heads = ["measure", "at", "subset", "n", "distilled", "freed", "reference", "freedom [95 % interval]"]
    heads += no_training.heads(untrained, brief=True)
    lines = {id(row): [*_freedom_line(row, family), *no_training.cells(untrained, row)] for row in rows}
    main = [row for row in rows if row.subset == "all" and _is_summary(row)]
    rest = [row for row in rows if row not in main]
    more = html.table(heads, [lines[id(row)] for row in rest], 3)
    details = f"<details><summary>By noise level and subjects ({len(rest)})</summary>{more}</details>" if rest else ""
    return f"""<h2>Freedom</h2><p>The share of the distance from the distilled model to the reference that is closed:
100 % is all of it, below 0 the distance has grown; “beyond” is clearly past the reference; “no gap” says that the two
do not clearly differ, so that there is nothing to close; “gap too noisy” that the share could be anything.</p>
{html.table(heads, [lines[id(row)] for row in main], 3)}{details}
{no_training.section(untrained, no_training.is_starred(rows, untrained))}"""


def _is_summary(row: FreedomRow) -> bool:
    return "sigma" not in row.at or (row.name in OVER_SIGMA and isinstance(row.at["sigma"], str))


def _freedom_line(row: FreedomRow, family: str) -> list[str]:
    name, at = title(row.name, row.at, family)
    values = [number(value) for value in (row.distilled, row.freed, row.reference)]
    return [name, place(at), row.subset, _count(row.count), *values, row.text]


def _count(count: int | None) -> str:
    return "" if count is None else str(count)


def _measures(results: Sequence[Result], names: Sequence[str]) -> str:
    tables = [{(row.name, tuple(row.at.items()), row.subset): row for row in one.measures} for one in results]
    keys = dict.fromkeys(key for table in tables for key in table)
    meanings = dict(MEANINGS)
    for own, _, told in results[0].settings.get("measures") or ():
        meanings |= {own: told, f"held_out_{own}": f"The same of the held-out pictures. {told}"}
    parts = []
    for name in dict.fromkeys(key[0] for key in keys):
        lines = []
        for key in (key for key in keys if key[0] == name):
            found = [table.get(key) for table in tables]
            lines.append(_measure_line(next(row for row in found if row is not None), found, _family(results)))
        heads = ("", "at", "subset", "n", *names, "theory", "unit")
        meaning = escape(meanings.get(name, ""))
        told = f'<summary><b>{escape(name)}</b> <span class="faint">{meaning}</span></summary>'
        parts.append(f"<details>{told}{html.table(heads, lines, 3)}</details>")
    return f"<h2>Every measure</h2>{''.join(parts)}"


def _measure_line(first: Measure, found: Sequence[Measure | None], family: str) -> list[str]:
    name, at = title(first.name, first.at, family)
    values = ["" if row is None else figure(row) for row in found]
    return [
        name,
        place(at),
        first.subset,
        _count(first.count),
        *values,
        "" if first.reference is None else f"{first.reference:g}",
        first.unit,
    ]


def _settings(results: Sequence[Result], names: Sequence[str]) -> str:
    parts = []
    for what, rows in (
        ("Models", [one.model for one in results]),
        ("Settings", [one.settings for one in results]),
        ("Versions", [one.versions for one in results]),
    ):
        keys = dict.fromkeys(key for row in rows for key in row)
        lines = [[key, *(_plain(row.get(key, "")) for row in rows)] for key in keys]
        parts.append(f"<details><summary>{what}</summary>{html.table(('', *names), lines, len(names) + 1)}</details>")
    took = ", ".join(f"{name} {one.seconds:.0f} s" for name, one in zip(names, results, strict=True))
    told = f'<p class="faint">{few.statement(results)} Measured in: {escape(took)}.</p>'
    return f"<h2>How it was measured</h2>{''.join(parts)}{told}"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "–"
    return "–" if value is None else str(value)


def _family(results: Sequence[Result]) -> str:
    data = results[0].settings.get("data") or ("",)
    return str(data[0])
