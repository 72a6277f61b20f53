"""What users of other tools pass, read once for all of them, or refused with what was expected and what came."""

from __future__ import annotations

from typing import Any

from ..models.steps import StepWindow

__all__ = ["check_count", "window"]


def check_count(name: str, given: Any, count: int, what: str, source: str) -> None:
    """Raise ValueError for a list of other than so many of what belongs to steps.

    Args:
        name: of the argument.
        given: a list, or a tensor whose first axis is the list's.
        count: how many there have to be.
        what: they are.
        source: where the right list comes from.
    """
    number = len(given) if hasattr(given, "__len__") and not isinstance(given, str) else None
    if number != count:
        got = type(given).__name__ if number is None else f"{number} {what}"
        raise ValueError(
            f"{name}: expected {count} {what}, got {got}: pass the list that {source} gave, of as many steps"
        )


def window(name: str, value: Any) -> StepWindow:
    """A share of the steps, or begin and end, of any kind of number.

    Raises:
        ValueError: anything else, such as a percentage, a text, or a begin after the end.
    """
    try:
        return StepWindow.parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
