"""Side-by-side pictures: the source, the target without control, the target with the edit, labelled.

`side_by_side` lays out one row per target. The words of a target prompt that the source prompt lacks are
coloured, so that a reader sees what was asked for before looking at what came out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Comparison", "changed_words", "side_by_side", "upscale"]

SMALLEST_TILE, LARGEST_TILE = 256, 512  # px, longest side of a picture in the layout

BACKGROUND = (255, 255, 255)
INK = (31, 35, 40)
MUTED = (101, 109, 118)
ACCENT = (9, 105, 218)
RULE = (216, 222, 228)

MARGIN, GAP = 24, 16  # px
FONT_SIZE = 16  # px
LEADING = 1.3  # line height over font size


#: Words with their colours.
Words = list[tuple[str, tuple[int, int, int]]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Comparison:
    """One row: a source image, its edit and, where it was made, the target without any control.

    Args:
        source_prompt: text under the source image.
        target_prompt: text under the target images; words that differ from the source prompt are coloured.
        source: image of the source prompt, or None where only the edit was kept.
        edited: image of the target prompt with the edit.
        uncontrolled: image of the target prompt from the same noise without the edit, or None.
        reconstruction: what the source's inversion gives back, where the source is a photo.
    """

    source_prompt: str
    target_prompt: str
    source: Image.Image | None
    edited: Image.Image
    uncontrolled: Image.Image | None = None
    reconstruction: Image.Image | None = None


def side_by_side(
    rows: Sequence[Comparison],
    *,
    edit_label: str = "target, edited",
    reconstruction_label: str = "reconstruction",
    tile: int | None = None,
) -> Image.Image:
    """Lay comparisons out as one labelled RGB picture, a row each.

    Columns are source, its reconstruction, target without control, target with the edit; a column that no row fills
    is left out. Images keep their aspect ratio and are scaled so that their longest side is `tile` pixels.

    Args:
        rows: at least one comparison.
        edit_label: title of the last column, such as the name of the method.
        reconstruction_label: title of the second, such as how close it is.
        tile: longest side of each image in pixels; default: as small a whole multiple of the largest image as is
            256 or more, at most 512.

    Returns:
        An RGB image. The same input gives the same pixels with the same Pillow.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("side_by_side needs at least one row, got none")
    columns = [("source", "source"), (reconstruction_label, "reconstruction")]
    columns += [("target, no control", "uncontrolled"), (edit_label, "edited")]
    columns = [column for column in columns if any(getattr(row, column[1]) is not None for row in rows)]
    images = [[getattr(row, attribute) for _, attribute in columns] for row in rows]
    tile = tile or _tile_size([image for row in images for image in row if image is not None])
    tiles = [[None if image is None else upscale(image, tile) for image in row] for row in images]

    cell = max(image.width for row in tiles for image in row if image is not None)
    heights = [max(image.height for image in row if image is not None) for row in tiles]
    font = _font(FONT_SIZE)
    line = math.ceil(FONT_SIZE * LEADING)
    sources = sum(attribute in ("source", "reconstruction") for _, attribute in columns)
    has_source = sources > 0
    spans = [count * cell + (count - 1) * GAP for count in (sources, len(columns) - sources) if count]
    captions = [
        [_wrap(words, font, width) for words, width in zip(_captions(row, has_source), spans, strict=True)]
        for row in rows
    ]
    caption_heights = [line * max(len(lines) for lines in row) for row in captions]
    titles = [_wrap([(word, MUTED) for word in title.split()], font, cell) for title, _ in columns]
    most = max(len(lines) for lines in titles)

    width = 2 * MARGIN + len(columns) * cell + (len(columns) - 1) * GAP
    header = most * line + GAP // 2
    height = 2 * MARGIN + header + sum(heights) + sum(caption_heights) + len(rows) * (GAP // 2)
    height += (len(rows) - 1) * 2 * GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    lefts = [MARGIN + index * (cell + GAP) for index in range(len(columns))]
    for left, lines in zip(lefts, titles, strict=True):
        for number, words in enumerate(lines, start=most - len(lines)):  # the last one stands above the picture
            _centred(draw, words, font, left, cell, MARGIN + number * line)
    top = MARGIN + header
    for row, (pictures, lines_of_spans) in enumerate(zip(tiles, captions, strict=True)):
        for left, picture in zip(lefts, pictures, strict=True):
            if picture is not None:
                offset = ((cell - picture.width) // 2, (heights[row] - picture.height) // 2)
                canvas.paste(picture, (left + offset[0], top + offset[1]))
        top += heights[row] + GAP // 2
        span_left = MARGIN
        for lines, span in zip(lines_of_spans, spans, strict=True):
            for number, words in enumerate(lines):
                _centred(draw, words, font, span_left, span, top + number * line)
            span_left += span + GAP
        top += caption_heights[row] + 2 * GAP
        if row + 1 < len(rows):
            draw.line([(MARGIN, top - GAP), (width - MARGIN, top - GAP)], fill=RULE)
    return canvas


def upscale(image: Image.Image, longest: int) -> Image.Image:
    """The image in RGB, scaled with a Lanczos filter so that its longest side is `longest` pixels."""
    scale = longest / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.convert("RGB")
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def changed_words(source: str, target: str) -> list[tuple[str, bool]]:
    """The words of a target prompt, each with whether the source prompt lacks it at that place."""
    words, targets = source.split(), target.split()
    matcher = difflib.SequenceMatcher(a=[w.lower() for w in words], b=[w.lower() for w in targets], autojunk=False)
    new = [True] * len(targets)
    for block in matcher.get_matching_blocks():
        new[block.b : block.b + block.size] = [False] * block.size
    return list(zip(targets, new, strict=True))


def _tile_size(images: Sequence[Image.Image]) -> int:
    longest = max(max(image.size) for image in images)
    return min(longest * max(1, math.ceil(SMALLEST_TILE / longest)), LARGEST_TILE)


def _captions(row: Comparison, has_source: bool) -> list[Words]:
    """Words and colours under the source column (where there is one) and under the target columns."""
    plain = [(word, INK) for word in row.source_prompt.split()]
    coloured = [(word, ACCENT if new else INK) for word, new in changed_words(row.source_prompt, row.target_prompt)]
    return [plain, coloured] if has_source else [coloured]


def _wrap(words: Words, font: Font, width: int) -> list[Words]:
    """Break coloured words into lines of at most `width` pixels; a longer word stands alone, shortened."""
    lines: list[Words] = [[]]
    for word, colour in words:
        word = _shortened(word, font, width)
        candidate = " ".join([w for w, _ in lines[-1]] + [word])
        if lines[-1] and font.getlength(candidate) > width:
            lines.append([])
        lines[-1].append((word, colour))
    return lines


def _shortened(word: str, font: Font, width: int) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(word + "…") > width:
        word = word[:-1]
    return word + "…"


def _centred(draw: ImageDraw.ImageDraw, words: Words, font: Font, left: int, width: int, top: int) -> None:
    space = font.getlength(" ")
    length = sum(font.getlength(word) for word, _ in words) + space * max(0, len(words) - 1)
    x = left + (width - length) / 2
    for word, colour in words:
        draw.text((x, top), word, fill=colour, font=font)
        x += font.getlength(word) + space


def _font(size: int) -> Font:
    """Pillow's own font: the same on every machine, with nothing to install."""
    return ImageFont.load_default(size)
