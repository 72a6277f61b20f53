"""Numbers that callers pass, refused where they are none."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

__all__ = ["check_finite", "check_positive"]


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for anything but whole numbers from 1 on, of NumPy too."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, received {number!r}")


def check_finite(**numbers: Any) -> None:
    """Raise ValueError for anything but finite numbers."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, received {number!r}")
