"""The page of captions: pictures beside what was written of them, to be read through; what failed comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from libreflux import __version__
from libreflux.captioning.answers import MEANINGS
from libreflux.captioning.asking import OpenPicture
from libreflux.captioning.journal import FAILED, KEPT, Entry
from libreflux.errors import DataError
from libreflux.files import atomic_write_text
from libreflux.printing import counted, shortened
from libreflux.probing.report import html

SIDE = 320
"""Pixels of the longer side of a picture on the page."""
QUALITY = 82
MOST_PICTURES = 200
MOST_FAILED = 100
_STYLE = """<style>
.read { display: grid; grid-template-columns: minmax(8rem, 20rem) 1fr; gap: 1rem 1.4rem; margin: 1.6rem 0;
  align-items: start; break-inside: avoid; }
.read h3 { margin: 0 0 .4rem; font-weight: 600; overflow-wrap: anywhere; } .read dl { margin: 0; }
.read dt { color: var(--faint); font-size: .85rem; } .read dd { margin: 0 0 .6rem; } .bad { color: var(--c1); }
@media (max-width: 40rem) { .read { grid-template-columns: 1fr; } }
</style>"""


def write(
    page: Path, root: Path, made: Mapping[str, Mapping[str, str]], failed: Sequence[Entry], open_picture: OpenPicture
) -> None:
    """Writes the page, one file that loads nothing.

    Args:
        page: where to; replaced.
        root: the folder of pictures.
        made: captions by picture and name; of more than 200 pictures every n-th is shown.
        failed: what has no usable answer; 100 are shown.
        open_picture: gives the pictures at most `SIDE` pixels wide and high.
    """
    step = -(-len(made) // MOST_PICTURES) or 1
    shown = list(made)[::step]
    words = sum(len(caption.split()) for names in made.values() for caption in names.values())
    count = sum(map(len, made.values()))
    told = f"{counted(count, 'caption')} of {counted(len(made), 'picture')}"
    mean = f", {words / count:.0f} words in the mean" if count else ""
    some = f"; every {step}. picture is shown" if step > 1 else ""
    body = [
        _STYLE,
        f"<h1>Captions of {escape(root.name or str(root))}</h1>",
        f"<p>{told}{mean}; {counted(len(failed), 'answer')} of no use{some}. Read some of them beside their pictures "
        "before you train on them: a model describes what is not there, too.</p>",
        _failed(failed, open_picture),
        "<h2>Captions</h2>" if shown else "",
        *(_read(file, _captions(made[file]), open_picture) for file in shown),
        f'<p class="faint">libreflux {__version__}</p>',
    ]
    atomic_write_text(page, html.document(f"Captions of {root.name}", "\n".join(body)))


def _failed(failed: Sequence[Entry], open_picture: OpenPicture) -> str:
    if not failed:
        return ""
    of_files: dict[str, list[Entry]] = {}
    for one in failed[:MOST_FAILED]:
        of_files.setdefault(one.file, []).append(one)
    rows = [_read(file, "".join(map(_fault, of_file)), open_picture) for file, of_file in of_files.items()]
    more = f", of which {MOST_FAILED} are shown" if len(failed) > MOST_FAILED else ""
    told = f"{len(failed)} in all{more}; {FAILED} in the folder {KEPT} lists them."
    return "\n".join([f"<h2>Without a caption</h2><p>{told}</p>", *rows])


def _fault(one: Entry) -> str:
    meant = escape(MEANINGS[one.fault] if one.fault else "")
    times = "asked once" if one.tries == 1 else f"asked {one.tries} times"
    said = escape(shortened(one.caption, 300))
    return f'<dt>{escape(one.name)}, {times}</dt><dd><b class="bad">{meant}</b><br>{said}</dd>'


def _captions(names: Mapping[str, str]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(caption)}</dd>" for name, caption in names.items())


def _read(file: str, told: str, open_picture: OpenPicture) -> str:
    try:
        picture = html.image(html.jpeg(open_picture(file), SIDE, QUALITY), file, "jpeg")
    except DataError:
        picture = '<p class="faint">no picture</p>'
    return f'<div class="read"><div>{picture}</div><div><h3>{escape(file)}</h3><dl>{told}</dl></div></div>'
