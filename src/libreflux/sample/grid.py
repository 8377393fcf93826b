"""Labelled contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)


def sheet(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    font_size: int = 13,
) -> Image.Image:
    """Pictures in rows and columns on white, with labels to the left and above.

    Args:
        images: rows of pictures; rows may differ in length, None leaves a gap. All cells have the largest size.
        row_labels: one per row, wrapped, or none at all.
        column_labels: one per column, wrapped, or none at all.
        font_size: pixels.

    Raises:
        ValueError: no picture, or a number of labels that is not that of rows or columns.
    """
    pictures = [image for row in images for image in row if image is not None]
    if not pictures:
        raise ValueError("no pictures")
    rows, columns = len(images), max(len(row) for row in images)
    for labels, count, what in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if labels and len(labels) != count:
            raise ValueError(f"{len(labels)} {what} labels for {count} {what}s")
    cell_width = max(image.width for image in pictures)
    cell_height = max(image.height for image in pictures)
    font = ImageFont.load_default(size=font_size)
    left_texts = [_wrap(label, 24) for label in row_labels]
    top_texts = [_wrap(label, max(6, int(cell_width / (0.55 * font_size)))) for label in column_labels]
    left, top = _extent(left_texts, font)[0], _extent(top_texts, font)[1]

    # A row is as high as its picture or its label, whichever is larger.
    heights = [max(cell_height, _extent([text], font)[1]) for text in left_texts] or [cell_height] * rows
    width = left + MARGIN + columns * (cell_width + MARGIN)
    canvas = Image.new("RGB", (width, top + MARGIN + sum(heights) + MARGIN * rows), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(top_texts):
        draw.multiline_text((left + MARGIN + column * (cell_width + MARGIN), MARGIN), text, INK, font)
    y = top + MARGIN
    for row, cells in enumerate(images):
        if left_texts:
            draw.multiline_text((MARGIN, y), left_texts[row], INK, font)
        for column, image in enumerate(cells):
            if image is not None:
                canvas.paste(image.convert("RGB"), (left + MARGIN + column * (cell_width + MARGIN), y))
        y += heights[row] + MARGIN
    return canvas


def _wrap(label: str, width: int) -> str:
    return "\n".join(textwrap.wrap(label, width)) or label


def _extent(texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Room for the largest of these texts, a margin before it included; (0, 0) for none."""
    if not texts:
        return 0, 0
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), text, font) for text in texts]
    return MARGIN + max(int(box[2]) + 1 for box in boxes), MARGIN + max(int(box[3]) + 1 for box in boxes)
