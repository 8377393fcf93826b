"""What is said of the controls that need no training, beside freedom."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from libreflux.probing.freedom import FreedomRow
from libreflux.probing.no_training import KINDS, NoTraining
from libreflux.probing.report import html
from libreflux.probing.report.labels import place

STAR = "* Not clearly off the reference, at one place or more: the upper end counts it as arrived there."


def heads(found: NoTraining | None, *, brief: bool = False) -> list[str]:
    """Heads of the columns of `cells`: no training, the distilled model at w, and times k."""
    if found is None:
        return []
    return [f"w {found.w:.2f}", "k"] if brief else [f"untrained, w {found.w:.2f}", "untrained, k(sigma)"]


def cells(found: NoTraining | None, row: FreedomRow, *, brief: bool = False) -> list[str]:
    """What each control closes by a row's measure; "" where it says nothing of it."""
    if found is None:
        return []
    rows = [found.find(row, kind) for kind in KINDS]
    return ["" if one is None else one.control.brief if brief else one.control.text for one in rows]


def explained(found: NoTraining) -> str:
    """What the two columns are, in sentences."""
    return (
        f"Without any training: the distilled model drawn at guidance w (under guidance g: at w g), and its velocity "
        f"times a factor k for each noise level. Both were chosen on {found.chosen_on} of the pictures, by the loss, "
        f"and are measured on the other {found.measured_on}; what is drawn, over all prompts."
    )


def sentence(found: NoTraining | None) -> str:
    """For the findings, as HTML: what no training at all makes good; "" where nobody knows."""
    if found is None:
        return ""
    named = {"loss": "error", "slope": "calibration"}
    parts = []
    for row in found.rows:
        control, at = row.control, dict(row.control.at)
        if control.name in named and at == {"sigma": "all", "text": "caption"}:
            how = f"guidance {found.w:.2f}" if row.kind == "w" else "a factor for each noise level"
            freed = f" (training: {escape(row.freed.text)})" if row.freed is not None else ""
            parts.append(f"{how} <b>{escape(control.text)}</b> by {named[control.name]}{freed}")
    if not parts:
        return ""
    intro = f"The distilled model, used in another way, on the {found.measured_on} pictures that chose nothing:"
    return f"<b>Without any training.</b> {intro} {'; '.join(parts)}."


def section(found: NoTraining | None, starred: bool) -> str:
    """HTML: what is compared, and both controls beside training on the same pictures."""
    star = f'<p class="faint">{STAR}</p>' if starred else ""
    if found is None:
        return star
    titles = ("measure", "at", "n", "freed", *heads(found))
    lines = [
        _line(found, row.control, row.freed)
        for row in found.rows
        if row.kind == "k" or found.find(row.control, "k") is None
    ]
    table = html.table(titles, lines, 2)
    factors = ", ".join(f"{k:.2f} at {sigma:g}" for sigma, k in found.k.items())
    return f"""{star}<h3>How much needs no training</h3><p>{escape(explained(found))} What a control closes, no training
is needed for.</p><p class="faint">Factors k by noise level: {factors}.</p>
<details><summary>Controls beside training, on the same pictures ({len(lines)})</summary>{table}</details>"""


def _line(found: NoTraining, row: FreedomRow, freed: FreedomRow | None) -> list[str]:
    count = "" if row.count is None else str(row.count)
    return [row.name, place(row.at), count, "" if freed is None else freed.text, *cells(found, row)]


def is_starred(rows: Sequence[FreedomRow], found: NoTraining | None) -> bool:
    """Whether a table of these has a star to be explained."""
    controls = [] if found is None else [row.control for row in found.rows]
    return any(row.verdict == "gap" and row.snapped for row in [*rows, *controls])
