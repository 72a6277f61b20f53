"""Whose line asked: what is said names a line of the user's, whatever calls of ours and of libraries lie between."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container
from typing import Any

__all__ = ["asking_line", "warn"]

#: Packages whose frames stand between a user's line and what is said of it.
_BETWEEN = frozenset({"fpe_pipeline", "fpe_kernels", "torch", "diffusers", "transformers", "accelerate", "contextlib"})
_OURS = frozenset({"fpe_pipeline", "fpe_kernels", "torch"})


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line outside this package and the libraries that it works in.

    Python shows a warning once for each line that it names: one that named a line of this package would be shown to the
    first caller alone.
    """
    warnings.warn(message, category, stacklevel=_outside(_BETWEEN)[1])


def asking_line() -> tuple[str, int]:
    """File and line of the innermost caller outside this package and PyTorch."""
    frame, _ = _outside(_OURS)
    return frame.f_code.co_filename, frame.f_lineno


def _outside(packages: Container[str]) -> tuple[Any, int]:
    """The innermost frame of none of these packages, and what its ``stacklevel`` is to the caller of this."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
        frame, level = frame.f_back, level + 1
    return frame, level
