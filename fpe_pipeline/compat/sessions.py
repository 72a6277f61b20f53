"""Sessions that outlast a call: what a tool registers stays until it is restored."""

from __future__ import annotations

import warnings

from ..session.session import EditingSession

__all__ = ["leave"]


def leave(session: EditingSession) -> None:
    """End a session; that nothing ran in it is no reason to warn, as it was registered for calls to come."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the editing session ended without a call", RuntimeWarning)
        session.__exit__(None, None, None)
