"""What stands on a terminal: the paths of results, warnings, what a command has to say, and no library's advice."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..texts import print_text

__all__ = ["open_streams", "print_paths", "quiet_imports", "report", "say", "warnings_on_stderr"]


def print_paths(paths: Iterable[Path]) -> None:
    """Paths of results on standard output, one a line."""
    for path in paths:
        print_text(path, flush=True)


def report(paths: Iterable[Path], as_json: bool, **more: Any) -> None:
    """Paths of results on standard output, or, as JSON, an object of them as ``files`` and of what else there is."""
    if not as_json:
        print_paths(paths)
        return
    print_text(json.dumps({**more, "files": [str(path) for path in paths]}, indent=2, allow_nan=False), flush=True)


def say(text: str) -> None:
    """A line of the command's on standard error."""
    print_text(f"fpe: {text}", sys.stderr)


class _ToStandardError(logging.StreamHandler):  # type: ignore[type-arg] # generic for type checkers alone
    """Writes to what standard error is now: progress bars stand in its place while they are shown."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        pass


def open_streams() -> None:
    """Give what is said to nobody where standard output or standard error is closed: then Python has None for it, which
    costs a finished run its exit code and sends errors into the output."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process lives


def quiet_imports() -> None:
    """Keep diffusers and transformers from advising on optional packages when they are imported.

    Their own variables (``TRANSFORMERS_VERBOSITY=info``) stand where they are set.
    """
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


@contextlib.contextmanager
def warnings_on_stderr(say: Callable[[str], None]) -> Iterator[None]:
    """This package's warnings as lines of the command, told by ``say`` or logged: one line each."""
    from ..errors import EditWarning, RequestWarning

    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("fpe: %(message)s"))
    logger = logging.getLogger("fpe_pipeline")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    show = warnings.showwarning

    def told(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, EditWarning | RequestWarning):
            say(f"warning: {' '.join(str(message).split())}")
        else:
            show(message, category, *where, **options)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = told
            for kind in (EditWarning, RequestWarning):
                warnings.simplefilter("default", kind)
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
