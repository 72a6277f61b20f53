"""Text at the borders of the system: prompts that cannot be encoded, names that an output cannot spell, tables."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "check_no_address",
    "check_readable_name",
    "check_text",
    "did_you_mean",
    "markdown_table",
    "print_text",
    "unheard",
]


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """ "did you mean strength? ", with the blank, for names that nearly are known ones; empty where none is."""
    known = list(known)
    meant = dict.fromkeys(near[0] for name in names if (near := difflib.get_close_matches(name, known, 1)))
    return f"did you mean {', '.join(meant)}? " if meant else ""


def check_text(name: str, text: str) -> None:
    """Raise ValueError for text that is no Unicode: bytes of another encoding, as a command line may hand them over."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is no text in UTF-8: it holds {text[error.start : error.end]!a} at character {error.start} of "
            f"{text!a}; write it in UTF-8 (of a terminal, its locale decides)"
        ) from None


def check_readable_name(path: Path) -> None:
    """Raise ValueError for a path whose bytes are no UTF-8: the libraries that map and read tensors cannot open it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{str(path)!a} has a name that is no UTF-8, which the libraries for tensor files cannot open; rename "
            "it, or link to it by another name"
        ) from None


def check_no_address(path: str | Path) -> None:
    """Raise ValueError for an address on the web in the place of a path; `Path` makes one slash of two."""
    if re.match(r"(https?|s3|gs|ftp):/", str(path), re.IGNORECASE):
        raise ValueError(f"'{path}' is an address, and nothing is fetched: download the picture and pass its path")


def markdown_table(heading: Sequence[str], lines: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Markdown, with the first ``words`` columns to the left and the others, which hold numbers, to the right.

    Bars and ends of lines in a cell's text end no cell.
    """
    rule = [*["---"] * words, *["---:"] * (len(heading) - words)]
    return "\n".join("| " + " | ".join(map(_as_cell, line)) + " |" for line in [heading, rule, *lines])


def _as_cell(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "\\|")


@contextlib.contextmanager
def unheard(stream: TextIO, *lost: type[OSError]) -> Iterator[None]:
    """Go on where nobody takes what the block writes to a stream, which then leads nowhere.

    A run is owed its pictures and its exit code, whether or not somebody still reads what it says. The stream keeps
    what it could not write and tries again when Python ends, so it is its handle that is led elsewhere.

    Args:
        stream: standard output or standard error.
        lost: the errors that mean that nobody does.
    """
    try:
        yield
    except lost:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it has no handle
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, stream.fileno())
            os.close(handle)


def print_text(text: Any, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Write a line, whatever the output can encode: results exist by then, and their names are owed to the caller.

    What the output cannot encode goes as the bytes that the file system has for it, which is what a program that reads
    the line needs; where names are no bytes, as escapes. A reader that has gone costs nothing, nor does whatever keeps
    standard error from being written.
    """
    file = sys.stdout if file is None else file
    with unheard(file, OSError if file is sys.stderr else BrokenPipeError):
        _write(f"{text}\n", file)
        if flush:
            file.flush()


def _write(line: str, file: TextIO) -> None:
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        line.encode(encoding, getattr(file, "errors", None) or "strict")
    except UnicodeEncodeError:
        if os.name == "posix" and hasattr(file, "buffer"):
            file.flush()
            file.buffer.write(os.fsencode(line) if _is_name(line) else line.encode("utf-8", "backslashreplace"))
            file.buffer.flush()
            return
        line = line.encode(encoding, "backslashreplace").decode(encoding)
    file.write(line)


def _is_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
