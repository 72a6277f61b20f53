"""Writing results all or nothing: an error half-way leaves the folder as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import InputError

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
    """A temporary folder inside `directory`; what is written there moves up when the block ends without an error.

    Files of the same names are replaced, all of them or, where one cannot be, none; `directory` is made if missing.

    Raises:
        InputError: a folder has the name of one of the files.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".fpe-", dir=directory))
    try:
        yield stage
        _move(sorted(stage.iterdir(), key=lambda path: path.name == "run.json"), directory)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):  # someone else's files are there by now
            for folder in made:
                folder.rmdir()
        raise
    shutil.rmtree(stage, ignore_errors=True)


def _move(paths: Sequence[Path], directory: Path) -> None:
    """Move files into `directory`; an error puts back those that were there before."""
    taken = [path.name for path in paths if (directory / path.name).is_dir()]
    if taken:
        raise InputError(
            f"cannot write {', '.join(taken)} into '{directory}': folders have these names; rename them, or pass "
            "another folder with -o"
        )
    if not paths:
        return
    before = Path(tempfile.mkdtemp(dir=paths[0].parent))
    try:
        for path in paths:
            destination = directory / path.name
            if os.path.lexists(destination):
                os.replace(destination, before / path.name)
            os.replace(path, destination)
    except BaseException:
        for path in paths:
            if os.path.lexists(before / path.name):
                os.replace(before / path.name, directory / path.name)
            elif not path.exists():
                (directory / path.name).unlink()
        raise
