"""Numbers that callers pass, refused where they are none."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

__all__ = ["EditWarning", "check_guidance", "check_positive"]


class EditWarning(RuntimeWarning):
    """Something was asked for that had no effect, or will hardly give what was meant."""


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for anything but whole numbers from 1 on, of NumPy too."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, received {number!r}")


def check_guidance(guidance_scale: Any) -> None:
    """Raise ValueError for a scale that is no finite number."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, received {guidance_scale!r}")
