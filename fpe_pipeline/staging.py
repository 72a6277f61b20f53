"""Folders in which files are written beside their destination, and what a process that was killed left of them.

A stage is locked by the process that writes to it, and the system takes the lock away with the process, however that
ends: a stage that another can lock is nobody's. Where folders cannot be locked (Windows, some network file systems),
none is taken for left.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["BEFORE", "clear_stages", "new_stage"]

#: What is added to the name of a file that makes room for a new one, until all new ones are in their places.
BEFORE = ".before"


def new_stage(directory: Path) -> tuple[Path, int | None]:
    """A new folder inside ``directory``, and the handle that locks it until it is closed or the process has ended."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=_prefix(), dir=directory))
        try:
            lock = _locked(stage)
        except (BlockingIOError, FileNotFoundError):  # another process, which takes it for left, was faster
            continue
        if lock is None or stage.exists():
            return stage, lock
        os.close(lock)


def clear_stages(directory: Path) -> None:
    """Delete the stages of processes of this machine that were killed; a file that was making room gets its name back.

    Those of other machines stay, on whose locks a shared disk cannot be relied.
    """
    for stage in directory.glob(f"{_prefix()}*"):
        try:
            lock = _locked(stage)
        except OSError:  # somebody writes there, or it is another user's
            continue
        if lock is None:
            continue
        with contextlib.suppress(OSError):
            for kept in stage.glob(f"*{BEFORE}"):
                if not os.path.lexists(place := directory / kept.name.removesuffix(BEFORE)):
                    os.replace(kept, place)
            shutil.rmtree(stage)
        os.close(lock)


def _prefix() -> str:
    machine = re.sub(r"\W", "-", platform.node(), flags=re.ASCII)[:64]
    return f".fpe-{machine}-"


def _locked(folder: Path) -> int | None:
    """A handle that locks a folder; None where folders cannot be locked.

    Raises:
        OSError: it is gone, or locked already.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle
