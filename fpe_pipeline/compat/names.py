"""What is said of a name that a tool does not have, or that is not served."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["names_of"]


def names_of(tool: str, served: Iterable[str], refused: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A module's ``__getattr__``, so that an import of a name that is not there says what there is.

    Args:
        tool: what the module stands for.
        served: the names that it has.
        refused: names that the tool has and the module has not, each with the reason.
    """
    names, reasons = tuple(served), dict(refused or {})

    def missing(name: str) -> Any:
        if name.startswith("__"):  # what the machinery of imports looks for
            raise AttributeError(name)
        if name in reasons:
            raise ImportError(f"{tool}'s {name} is not served: {reasons[name]}")
        near = difflib.get_close_matches(name, names, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ImportError(f"{tool} has no {name}{meant}: there is {', '.join(sorted(names))}")

    return missing
