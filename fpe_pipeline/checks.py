"""Numbers that callers pass, refused where they are none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

from .words import unknown_words

__all__ = ["EditWarning", "RequestWarning", "check_guidance", "check_positive", "warn_of_size", "warn_of_unknown_words"]

#: Times more, or fewer, pixels than a model was trained for, from which on it is warned of.
FAR = 3.5


class EditWarning(RuntimeWarning):
    """Something was asked for that had no effect."""


class RequestWarning(UserWarning):
    """What was asked for will hardly give what was meant."""


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for anything but whole numbers from 1 on, of NumPy too."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, received {number!r}")


def check_guidance(guidance_scale: Any) -> None:
    """Raise ValueError for a scale that is no finite number."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, received {guidance_scale!r}")


def warn_of_size(size: tuple[int, int], native: tuple[int, int]) -> None:
    """Warn of a (height, width) in pixels far from the one that a model was trained for."""
    share = size[0] * size[1] / (native[0] * native[1])
    if not 1 / FAR < share < FAR:
        warnings.warn(
            f"{size[1]} x {size[0]} pixels (width x height) are {share:.2g} times those that the model was trained for "
            f"({native[1]} x {native[0]}): expect {'objects twice' if share > 1 else 'no recognisable picture'}",
            RequestWarning,
            stacklevel=3,
        )


def warn_of_unknown_words(prompts: Iterable[str], tokenizer: Any) -> None:
    """Warn of words that a tokenizer has no tokens for, so that a model can hardly have learnt what they mean."""
    for prompt in dict.fromkeys(prompts):
        unknown = unknown_words(prompt, tokenizer)
        if unknown:
            warnings.warn(
                f"the model's tokenizer does not know {', '.join(map(repr, unknown))} of {prompt!r}: such words are "
                "spelt letter by letter, and the model has hardly learnt what they mean (`fpe info` lists what the "
                "embedded model draws)",
                RequestWarning,
                stacklevel=3,
            )
