"""What callers pass, refused in one line that says what to do where it is something else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from .callers import warn

__all__ = [
    "EditWarning",
    "InputError",
    "Lacking",
    "RequestWarning",
    "check_generator",
    "check_guidance",
    "check_positive",
    "check_text_length",
    "refusals",
    "warn_of_size",
]

#: Times more, or fewer, pixels than a model was trained for, from which on it is warned of.
FAR = 3.5


class InputError(ValueError):
    """A request that cannot be served as it stands: says what was expected, what came and what to do."""


class Lacking(InputError):
    """A recording does not hold what an edit needs of its source.

    Args:
        what: is missing, for which edit.
        advice: what to do, where it is Python that asked; others add their own to ``what``.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """In a ``with`` block, a ValueError, and an error of these kinds, is raised as an `InputError` in its words."""
    caught: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except InputError:
        raise
    except caught as error:
        raise InputError(str(error)) from error


class EditWarning(RuntimeWarning):
    """Something was asked for that had no effect."""


class RequestWarning(UserWarning):
    """What was asked for will hardly give what was meant."""


def check_positive(**numbers: Any) -> None:
    """Raise ValueError for anything but whole numbers from 1 on, of NumPy too."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}")


def check_text_length(max_sequence_length: Any) -> None:
    """Raise ValueError for anything but whole numbers from 1 on, and None, which is the pipeline's own."""
    if max_sequence_length is not None:
        check_positive(max_sequence_length=max_sequence_length)


def check_guidance(guidance_scale: Any) -> None:
    """Raise ValueError for a scale that is no finite number."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")


def warn_of_size(size: tuple[int, int], native: tuple[int, int]) -> None:
    """Warn of a (height, width) in pixels far from the one that a model was trained for."""
    share = size[0] * size[1] / (native[0] * native[1])
    if not 1 / FAR < share < FAR:
        warn(
            f"{size[1]} x {size[0]} pixels (width x height) are {share:.2g} times those that the model was trained for "
            f"({native[1]} x {native[0]}): expect {'objects twice' if share > 1 else 'no recognisable picture'}",
            RequestWarning,
        )


def check_generator(generator: Any) -> None:
    """Raise TypeError for anything but a generator, a list of them or None; a seed is what most people mean."""
    import torch

    given = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
    for each in given:
        if not isinstance(each, torch.Generator):
            seed = int(each) if hasattr(each, "__index__") else 0
            raise TypeError(
                f"expected generator to be a torch.Generator, got {each!r}: write "
                f"generator=torch.Generator().manual_seed({seed})"
            )
