"""Writing files all or nothing, and onto the disk: an error half-way leaves what was there.

Whatever is written here is written beside its destination, brought to the disk and renamed, and then its folder is
brought to the disk: after a crash, too, there is the whole old file or the whole new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .staging import BEFORE, clear_stages, new_stage

__all__ = ["check_writable", "clear_left", "replaced", "save_tensors", "staged", "write_text"]

#: What file systems answer that cannot bring a folder to the disk.
_NOT_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP)


def check_writable(directory: Path) -> None:
    """Raise `InputError` unless files can be written into `directory`, which need not exist yet."""
    existing = directory
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.exists():  # such as the folder of a disk that is not mounted; no folder can be made of it
            raise NotADirectoryError(f"'{existing}' is a link to nothing")
        if not existing.is_dir():
            raise NotADirectoryError(f"'{existing}' is a file")
        for missing in (directory, *(existing / name for name in directory.parts[len(existing.parts) :])):
            with contextlib.suppress(FileNotFoundError):
                missing.lstat()  # says where a name is too long for the file system
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into '{directory}': {error.strerror or error}; pass another folder with -o"
        ) from error


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write one file to; it becomes `path` when the block ends without an error.

    A file of that name is replaced, its folder made if missing. What a process that was killed left of writing the same
    file is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent, path.name)
    # Of the process: two that write the same file each write their own.
    partial = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.part")
    try:
        with _naming(path):
            yield partial
            _bring_in({partial: path})
    finally:
        partial.unlink(missing_ok=True)


def clear_left(folder: Path) -> None:
    """Delete what processes that were killed were writing to a folder by :func:`replaced`.

    What a living process writes stays, and files that are not of ours; a folder that does not exist has none.
    """
    _clear(folder)


def _clear(folder: Path, name: str | None = None) -> None:
    """Delete what was left of a file, or of any; what other machines write on a shared disk is not known to be left."""
    for partial in folder.glob(".*.part"):
        ours = re.fullmatch(rf"\.(.+)\.{_machine()}-(\d+)\.part", partial.name, flags=re.DOTALL | re.ASCII)
        if ours is None or name not in (None, ours[1]) or _lives(int(ours[2])):
            continue
        with contextlib.suppress(OSError):  # it has become what it was to be, or Windows knows that it is open
            partial.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as other files are written.

    The library has an error of its own for what the disk answers, and gives its files to their owner alone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with path.open("ab"):
        mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary folder inside `directory`; what is written there moves up when the block ends without an error.

    Files of the same names are replaced, all of them or, where one cannot be, none; `directory` is made if missing.

    Raises:
        InputError: a folder has the name of one of the files.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    clear_stages(directory)
    stage, lock = new_stage(directory)
    try:
        with _naming(directory):
            yield stage
            # The record of a run comes last: where it is, its images are.
            paths = sorted(stage.iterdir(), key=lambda path: path.name == "run.json")
            _check_names(directory, [path.name for path in paths])
            _bring_in({path: directory / path.name for path in paths})
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)  # before the folders that hold it
        with contextlib.suppress(OSError):  # someone else's files are there by now
            for folder in made:
                folder.rmdir()
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Have errors of writing name the place: where a disk is full, the system does not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


def _machine() -> str:
    """This machine in eight letters: a file's name may be long already."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _lives(process: int) -> bool:
    """Whether a process of that number runs on this machine; on Windows, which keeps open files, not asked."""
    if os.name == "nt":  # where the question would end the process
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _check_names(directory: Path, names: list[str]) -> None:
    taken = [name for name in names if (directory / name).is_dir()]
    if taken:
        raise InputError(
            f"cannot write {', '.join(taken)} into '{directory}': folders have these names; rename them, or pass "
            "another folder with -o"
        )


def _bring_in(destinations: Mapping[Path, Path]) -> None:
    """Rename files to their destinations, on the disk; an error puts back those that were there before."""
    before = {path: path.with_name(f"{path.name}{BEFORE}") for path in destinations}
    try:
        for path in destinations:
            _to_disk(path)
        for path, destination in destinations.items():
            if os.path.lexists(destination):
                _keep(destination, before[path])
            os.replace(path, destination)
        for folder in dict.fromkeys(destination.parent for destination in destinations.values()):
            _to_disk(folder)
    except BaseException:
        for path, destination in destinations.items():
            if os.path.lexists(before[path]):
                os.replace(before[path], destination)
                before[path].unlink(missing_ok=True)  # two names of one file are both left
            elif not os.path.lexists(path):
                destination.unlink(missing_ok=True)
        raise
    for kept in before.values():
        with contextlib.suppress(OSError):  # the new files are there: a second name of an old one does no harm
            kept.unlink(missing_ok=True)


def _keep(path: Path, second: Path) -> None:
    """Give a file a second name, and leave it the first where the file system can."""
    try:
        os.link(path, second, follow_symlinks=False)
    except (NotImplementedError, OSError):
        os.replace(path, second)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in _NOT_OF_FOLDERS):
            raise
    finally:
        os.close(handle)
