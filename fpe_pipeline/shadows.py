"""Methods of an object that are covered on the instance, with their signatures, until they are uncovered."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Shadows"]


class Shadows:
    """Covers methods of one object.

    Args:
        owner: whose methods; a copy that is made of it meanwhile has its own, uncovered.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._shadows: list[tuple[str, Any, Any]] = []

    def cover(self, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(original, …)`` in a method's stead; nothing where the object has no such method."""
        original = getattr(self._owner, name, None)
        if original is not None:
            shadow = _Shadow(original, around)
            self._shadows.append((name, vars(self._owner).get(name), shadow))
            setattr(self._owner, name, shadow)

    def remove(self) -> None:
        """Uncover the methods that were there before."""
        for name, shadowed, shadow in self._shadows:
            if vars(self._owner).get(name) is shadow:
                delattr(self._owner, name)
                if shadowed is not None:
                    setattr(self._owner, name, shadowed)
        self._shadows = []


class _Shadow:
    """What stands in a method's stead.

    Args:
        original: the method.
        around: is called with it, and with what the method is called with.
    """

    def __init__(self, original: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original, self._around = original, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the object has: the method itself, of the copy."""
        return copy.deepcopy(self._original, memo)
