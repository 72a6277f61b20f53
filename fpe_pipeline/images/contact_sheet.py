"""A grid of pictures with a word above each column and beside each row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .side_by_side import BACKGROUND, GAP, INK, MARGIN, MUTED, upscale

__all__ = ["contact_sheet"]

_FONT_SIZE, _LEADING = 16, 1.3
_SMALLEST = 128  # px, longest side of a picture


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str], title: str = ""
) -> Image.Image:
    """One RGB picture of many, a grid.

    Args:
        rows: of pictures, as many in each as there are columns.
        columns: label of each column.
        names: label of each row, "" for none.
        title: above all.

    Returns:
        The grid; each picture at its own size, or a whole multiple that is large enough to look at.

    Raises:
        ValueError: rows of another length than there are columns, or no pictures.
    """
    if not rows or any(len(row) != len(columns) for row in rows) or len(names) != len(rows):
        raise ValueError(
            f"expected {len(names)} rows of {len(columns)} pictures, got rows of {[len(row) for row in rows]}"
        )
    largest = max(max(image.size) for row in rows for image in row)
    tile = largest * max(1, math.ceil(_SMALLEST / largest))
    tiles = [[upscale(image, tile) for image in row] for row in rows]
    font = ImageFont.load_default(_FONT_SIZE)
    line = math.ceil(_FONT_SIZE * _LEADING)
    cell = max(max(image.width for row in tiles for image in row), *(math.ceil(font.getlength(c)) for c in columns))
    aside = max(math.ceil(font.getlength(name)) for name in names)
    left = MARGIN + (aside + GAP if aside else 0)
    heights = [max(image.height for image in row) for row in tiles]
    top = MARGIN + (line + GAP // 2 if title else 0)
    width = max(left + len(columns) * (cell + GAP) - GAP, MARGIN + math.ceil(font.getlength(title))) + MARGIN
    canvas = Image.new(
        "RGB", (width, top + line + GAP // 2 + sum(heights) + GAP * (len(rows) - 1) + MARGIN), BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font)
    for number, label in enumerate(columns):
        middle = left + number * (cell + GAP) + cell / 2
        draw.text((middle - font.getlength(label) / 2, top), label, fill=MUTED, font=font)
    top += line + GAP // 2
    for row, name, high in zip(tiles, names, heights, strict=True):
        draw.text((MARGIN, top + (high - line) / 2), name, fill=MUTED, font=font)
        for number, image in enumerate(row):
            canvas.paste(image, (left + number * (cell + GAP) + (cell - image.width) // 2, top))
        top += high + GAP
    return canvas
