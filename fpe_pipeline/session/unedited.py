"""Calls of a model that are left alone, whether or not somebody edits it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .session import session_of

__all__ = ["unedited"]


def unedited(pipe: Any) -> AbstractContextManager[None]:
    """Leave calls of a pipeline's model alone in a ``with`` block, whether or not it is in a session."""
    session = session_of(pipe)
    return nullcontext() if session is None else session.paused()
