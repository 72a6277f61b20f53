"""A drawing of boxes, arrows and words as SVG text: the same calls give the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

__all__ = ["GREY", "INK", "OURS", "PALE", "SOURCE", "TARGET", "Drawing"]

INK, GREY, PALE, OURS = "#1f2933", "#9aa5b1", "#f1f4f7", "#1b6ca8"
SOURCE, TARGET = "#cfe3f2", "#f6dccb"
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


@dataclass
class Drawing:
    """Elements in the order in which they were drawn; coordinates are pixels, from the upper left.

    Args:
        width, height: of the picture.
        title: what it shows, for those who cannot see it.
    """

    width: int
    height: int
    title: str
    elements: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, words: str = "", fill: str = PALE) -> None:
        """A rectangle with words in its middle."""
        self.elements.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='3' fill='{fill}' stroke='{GREY}'/>"
        )
        self.words(x + width / 2, y + height / 2, words, anchor="middle")

    def words(
        self, x: float, y: float, words: str, *, size: int = 12, colour: str = INK, anchor: str = "start"
    ) -> None:
        """A line of text whose middle is at the height ``y``."""
        if words:
            self.elements.append(
                f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' "
                f"dominant-baseline='central'>{escape(words)}</text>"
            )

    def line(self, start: tuple[float, float], end: tuple[float, float], *, strong: bool = False) -> None:
        """From one point to another: strong for what an edit changes."""
        colour, width = (OURS, 2) if strong else (GREY, 1)
        self.elements.append(
            f"<line x1='{start[0]:g}' y1='{start[1]:g}' x2='{end[0]:g}' y2='{end[1]:g}' "
            f"stroke='{colour}' stroke-width='{width}'/>"
        )

    def text(self) -> str:
        """The file."""
        head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' width='{self.width}' "
        return "\n".join(
            [
                f"{head}height='{self.height}' role='img' {FONT}>",
                f"<title>{escape(self.title)}</title>",
                f"<rect width='{self.width}' height='{self.height}' fill='#ffffff'/>",
                *self.elements,
                "</svg>\n",
            ]
        )
