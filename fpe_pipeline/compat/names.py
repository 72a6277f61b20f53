"""Names that a tool never had, and those that it had and this package has not, refused with what to do."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from ..texts import did_you_mean

__all__ = ["unknown_name"]


def unknown_name(
    module: str,
    tool: str,
    known: Iterable[str],
    left_out: Mapping[str, str] | None = None,
    modules: Iterable[str] = (),
) -> Callable[[str], Any]:
    """A module's ``__getattr__``, which says which names there are: an ImportError of ``from … import name``, and an
    AttributeError of everything else that looks, so that ``hasattr``, ``pickle`` and ``inspect`` go on.

    Args:
        module: its name.
        tool: whose surface it is.
        known: what it has.
        left_out: by name, why something of the tool's is not here.
        modules: names of modules in it, imported where they are asked for.
    """
    names, inside = sorted(known), frozenset(modules)

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if name in inside:
            return import_module(f"{module}.{name}")
        reason = (left_out or {}).get(name)
        said = f"{module} leaves out {name!r} of {tool}: {reason}. " if reason else f"{tool} has no {name!r} here: "
        said += f"{did_you_mean([name], names)}{module} has {', '.join(names)}"
        if _is_imported(sys._getframe(1)):
            raise ImportError(said, name=module)
        raise AttributeError(said)

    return missing


def _is_imported(frame: Any) -> bool:
    """Whether a frame is at ``from … import``, which keeps of an AttributeError nothing but the name."""
    return bool(frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"])
