"""Lines of cells as text in columns, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["columns"]


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns; a line with fewer cells than the first runs on in its last."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(cell) for cell in column) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )
