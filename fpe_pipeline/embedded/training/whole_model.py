"""A model's folder that is written whole: one with a ``model_index.json`` has everything else, of the same export."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["INDEX", "whole_model"]

INDEX = "model_index.json"
_STAGE = ".export-"


@contextlib.contextmanager
def whole_model(folder: Path) -> Iterator[Path]:
    """A folder to write a model to, whose parts take the place of those in ``folder`` when the block ends.

    An error, or an end of the process, in the block leaves what was there; what else lies in ``folder`` stays. The
    index goes first and comes last, so that an end while names change leaves no model rather than parts of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGE}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
    try:
        written, before = stage / "written", stage / "before"
        written.mkdir()
        before.mkdir()
        yield written
        names = sorted((path.name for path in written.iterdir()), key=lambda name: name == INDEX)
        for name in reversed(names):
            if os.path.lexists(folder / name):
                os.replace(folder / name, before / name)
        for name in names:
            os.replace(written / name, folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
