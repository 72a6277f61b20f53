"""Names that a tool never had, and those that it had and this package has not, refused with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..texts import did_you_mean

__all__ = ["unknown_name"]


def unknown_name(
    module: str, tool: str, known: Iterable[str], left_out: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """A module's ``__getattr__``: ``from … import name`` says which names there are.

    Args:
        module: its name.
        tool: whose surface it is.
        known: what it has.
        left_out: by name, why something of the tool's is not here.
    """
    names = sorted(known)

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        reason = (left_out or {}).get(name)
        said = f"{module} leaves out {name!r} of {tool}: {reason}. " if reason else f"{tool} has no {name!r} here: "
        # Of an AttributeError, `from … import` keeps nothing but the name.
        raise ImportError(f"{said}{did_you_mean([name], names)}{module} has {', '.join(names)}", name=module)

    return missing
