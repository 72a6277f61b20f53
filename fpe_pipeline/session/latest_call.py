"""What a session knows of the latest call of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from .layers.known_rows import RecordedLayer

__all__ = ["NO_CALL", "LatestCall"]


@dataclass(frozen=True)
class LatestCall:
    """The latest call of a model: what its rows are, and what a recording knows of them.

    Args:
        call: None once its step is over.
        roles: None where nothing was to be edited or watched.
        recorded: by layer path, what is known of the roles' recorded rows.
    """

    call: ModelCall | None = None
    roles: BatchRoles | None = None
    recorded: Mapping[str, RecordedLayer] | None = None

    @property
    def arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Positional and keyword arguments of the call; none once its step is over."""
        return ((), {}) if self.call is None else self.call.arguments


#: Before the first call, and of calls that are left alone.
NO_CALL = LatestCall()
