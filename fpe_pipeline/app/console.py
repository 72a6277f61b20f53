"""What stands on a terminal beside the results of a command: the version, warnings, and no library's advice."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Version", "quiet_imports", "warnings_on_stderr"]


class Version(argparse.Action):
    """Prints the version, for which torch is imported only where it is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **{**options, "dest": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fpe_kernels import __version__

        print(f"fpe {__version__}")
        parser.exit()


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

    handler = logging.StreamHandler()
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
