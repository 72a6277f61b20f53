"""Writes the reference from the docstrings: ``python -m docs.reference``."""

from __future__ import annotations

from pathlib import Path

from .pages import pages

FOLDER = Path(__file__).parent


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
