"""What users of other tools pass, read once for all of them, or refused with what was expected and what came."""

from __future__ import annotations

from typing import Any

from ..models.steps import StepWindow

__all__ = ["window"]


def window(name: str, value: Any) -> StepWindow:
    """A share of the steps, or begin and end, of any kind of number.

    Raises:
        ValueError: anything else, such as a percentage, a text, or a begin after the end.
    """
    try:
        return StepWindow.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
