"""One switch for code that is to change in its imports alone: the originals' own behaviour, without a keyword."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from ..edits.base import check_compat

__all__ = ["chosen_compat", "set_compat"]

_chosen: Literal["original"] | None = None


class set_compat(AbstractContextManager["set_compat"]):
    """Say for all tools what ``compat`` is where a call leaves it out: from here on, or in a ``with`` block::

        with set_compat("original"):
            registered = register_attention_control(pipe, controller)

    It is asked when something is registered, made or called, and holds in the whole process.

    Args:
        compat: "original", or None for the behaviour that is right.

    Raises:
        ValueError: another.
    """

    def __init__(self, compat: Literal["original"] | None) -> None:
        global _chosen
        check_compat(compat)
        self._compat, self._is_over = compat, False
        self._before, _chosen = _chosen, compat

    def __enter__(self) -> set_compat:
        global _chosen
        if self._is_over:  # one that is kept, for a second block
            self._before, _chosen, self._is_over = _chosen, self._compat, False
        return self

    def __exit__(self, *error: Any) -> None:
        global _chosen
        _chosen, self._is_over = self._before, True


def chosen_compat(compat: Any = None) -> Literal["original"] | None:
    """What a surface goes by: what its caller says, and where that is None what :class:`set_compat` said.

    Raises:
        ValueError: anything else than None and "original".
    """
    check_compat(compat)
    return "original" if compat == "original" else _chosen
