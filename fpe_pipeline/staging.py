"""Writing results all or nothing: an error half-way leaves the folder as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .loading import InputError

__all__ = ["check_writable", "staged"]


def check_writable(directory: Path) -> None:
    """Raise `InputError` unless files can be written into `directory`, which need not exist yet."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"'{existing}' is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into '{directory}': {error.strerror or error}; pass another folder with -o"
        ) from error


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary folder inside `directory`; what is written there moves up when the block ends without an error."""
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".fpe-", dir=directory))
    try:
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: path.name == "run.json"):
            os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
