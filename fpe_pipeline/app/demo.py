"""`fpe demo`: a few edits with the embedded model, all at the first seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..atomic_folder import check_writable, staged
from ..images.side_by_side import Comparison, side_by_side
from ..runs import run as runs
from ..runs.progress import Progress

__all__ = ["EDITS", "run"]

# Name, source, targets: changes of colour, of object and of background, in words that the model was trained on.
EDITS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "colour",
        "a photo of a red car on the beach",
        ("a photo of a blue car on the beach", "a photo of a yellow car on the beach"),
    ),
    ("object", "a photo of a purple balloon in the meadow", ("a photo of a purple mushroom in the meadow",)),
    ("background", "a photo of a green house in the snow", ("a photo of a green house in the desert",)),
)


def run(directory: Path, *, progress: Progress | None = None, seed: int = 0, **settings: Any) -> list[Path]:
    """Make every edit of `EDITS` into a folder of its own, and one picture of them all.

    Args:
        directory: receives demo.png and the folders, each as `fpe edit` writes it.
        progress: is told how far each edit has come.
        seed: of all edits.
        settings: further fields of `runs.Settings`.

    Returns:
        The paths written, demo.png first.

    Raises:
        InputError: there is no embedded model, or the folder cannot be written.
    """
    requests = {name: runs.Settings(source, targets, seed=seed, **settings) for name, source, targets in EDITS}
    for request in requests.values():
        request.check()
    check_writable(directory)
    rows: list[Comparison] = []
    written: list[Path] = []
    for name, request in requests.items():
        made = runs.execute(request, progress=progress, name=name)
        written += runs.write(made, directory / name)
        rows += made.comparisons()
    with staged(directory) as stage:
        side_by_side(rows, edit_label=made.edit_label).save(stage / "demo.png")
    return [directory / "demo.png", *written]
