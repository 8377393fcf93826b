"""The files of a grid: a labelled sheet, and a page whose arrow keys flip through its columns in place."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from libreflux import __version__
from libreflux.files import atomic_write_bytes, atomic_write_text
from libreflux.printing import counted
from libreflux.probing.report import html
from libreflux.sample.grid import sheet
from libreflux.sample.metadata import GenerationRecord
from libreflux.workflows.grid_cells import Cell

EMBEDDED_SIDE = 512


def write(
    sheet_file: Path, page: Path, table: Sequence[Sequence[Cell]], rows: Sequence[str], several_models: bool
) -> None:
    """Write the sheet, a PNG, and the page, HTML.

    Args:
        sheet_file, page: where to; replaced.
        table: rows of cells.
        rows: a label for each row.
        several_models: whether labels of columns name the model.
    """
    heads = [_head(cell.record, several_models) for cell in table[0]]
    pictures = [[Image.open(cell.path, formats=["PNG"]).convert("RGB") for cell in row] for row in table]
    held = io.BytesIO()
    sheet(pictures, rows, heads).save(held, "PNG", optimize=True)
    atomic_write_bytes(sheet_file, held.getvalue())
    atomic_write_text(page, html.document("libreflux grid", _body(table, pictures, rows, heads)))


def _head(record: GenerationRecord, several_models: bool) -> str:
    told = f"guidance {record.guidance:g}, {counted(record.steps, 'step')}"
    return f"{Path(record.model).name}, {told}" if several_models else told


def _body(
    table: Sequence[Sequence[Cell]],
    pictures: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    heads: Sequence[str],
) -> str:
    # Radio buttons before what they show: their arrow keys flip, and no script is needed.
    keys = "".join(
        f'<input type="radio" name="column" id="c{i}"{" checked autofocus" if i == 0 else ""}>'
        f'<label for="c{i}">{escape(head)}</label>'
        for i, head in enumerate(heads)
    )
    rules = "".join(f"#c{i}:checked~.flip .c{i}{{display:block}}" for i in range(len(heads)))
    blocks = []
    for label, cells, images in zip(rows, table, pictures, strict=True):
        shown = "".join(
            f'<figure class="c{i}">{html.image(html.jpeg(image, EMBEDDED_SIDE, 90), label, "jpeg")}'
            f"<figcaption><small>{escape(cell.record.parameters())}</small></figcaption></figure>"
            for i, (cell, image) in enumerate(zip(cells, images, strict=True))
        )
        blocks.append(f"<div><h3>{escape(label)}</h3>{shown}</div>")
    lines = []
    for label, cells, images in zip(rows, table, pictures, strict=True):
        row = "".join(
            f'<td title="{escape(cell.record.parameters())}">'
            f"{html.image(html.jpeg(image, 128, 80), label, 'jpeg')}</td>"
            for cell, image in zip(cells, images, strict=True)
        )
        lines.append(f"<tr><th>{escape(label)}</th>{row}</tr>")
    heading = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f"""<style>.flip figure {{ display: none; }} .flip {{ display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }} label {{ margin-right: 1rem; }}
.flip figcaption {{ font-weight: 400; }} {rules}</style>
<h1>The same noise, drawn {len(heads)} ways</h1>
<p class="faint">Choose a column, then flip with the arrow keys: pictures of one row start from one noise.</p>
{keys}<div class="flip">{"".join(blocks)}</div>
<h2>All together</h2>
<div class="scroll"><table class="pictures"><tr><th></th>{heading}</tr>{"".join(lines)}</table></div>
<p class="faint">libreflux {__version__}</p>"""
