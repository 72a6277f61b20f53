"""Draws the pictures of the documents: ``python -m docs.figures``.

Those of methods are drawn from the edits' own answers, so that a picture cannot say what the code does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import algebra, methods

FOLDER = Path(__file__).parent
FIGURES: dict[str, Callable[[], str]] = {
    "free-prompt": methods.free_prompt,
    "prompt-to-prompt": methods.prompt_to_prompt,
    "masactrl": methods.masactrl,
    "style-aligned": methods.style_aligned,
    "products": algebra.products,
    "join": algebra.join,
    "blocks": algebra.blocks,
    "forward": algebra.forward,
    "hopper": algebra.hopper,
}


def main() -> None:
    for name, draw in FIGURES.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
