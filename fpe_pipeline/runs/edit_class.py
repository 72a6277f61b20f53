"""The class of a run whose method somebody else wrote: what the record says of it, and whether it is still that."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .settings import Settings

__all__ = ["check_edit_class", "edit_class"]


def edit_class(method: str) -> dict[str, Any]:
    """What a record says of a method that is a class, under "edit"; {} for one of the package's."""
    from ..edits.method_class import names_a_class, origin_of

    return {"edit": origin_of(method)} if names_a_class(method) else {}


def check_edit_class(settings: Settings, record: dict[str, Any]) -> None:
    """Raise InputError where the record's method is a class that is missing, or whose file is another now."""
    from ..edits.method_class import changes_since, names_a_class

    if not names_a_class(settings.method):
        return
    recorded = record.get("edit")
    if not isinstance(recorded, dict) or recorded.get("class") != settings.method:
        raise InputError(
            f"the record does not say which file {settings.method} was of; pass --method {settings.method} to use the "
            "one that is there"
        )
    if changes := changes_since(recorded):
        raise InputError(changes)
