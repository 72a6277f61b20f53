"""Sessions that outlast a call: what a tool registers stays until it is restored."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from ..session.session import EditingSession

__all__ = ["HalvesSession", "RegisteredEdit", "has_targets", "leave"]


def leave(session: AbstractContextManager[Any]) -> None:
    """End a session; that nothing ran in it is no reason to warn, as it was registered for calls to come."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the editing session ended without a call", RuntimeWarning)
        session.__exit__(None, None, None)


def has_targets(roles: BatchRoles) -> bool:
    """Whether a batch holds rows that have a source: a call of one prompt has none, and is left as it is."""
    return any(source != row for row, source in enumerate(roles.source_of))


class RegisteredEdit(AbstractContextManager["RegisteredEdit"]):
    """An edit of every call of a pipeline from here on, until :meth:`restore` or the end of a ``with`` block.

    One that was registered on the same model before is taken off first, as registering anew does in the originals.

    Args:
        session: of the edit, not entered yet.

    Raises:
        RuntimeError: the model is in a session that no tool registered.
        ValueError: layers that cannot be edited.
    """

    def __init__(self, session: EditingSession) -> None:
        self._session: EditingSession | None = None
        self._model = session.adapter.module
        earlier = _REGISTERED.get(self._model)
        if earlier is not None:
            earlier.restore()
        session.__enter__()
        self._session = session
        _REGISTERED[self._model] = self

    def restore(self) -> None:
        """Leave the pipeline as it was found; a second time does nothing."""
        session, self._session = self._session, None
        if session is not None:
            del _REGISTERED[self._model]
            leave(session)

    def __exit__(self, *error: Any) -> None:
        self.restore()


class HalvesSession(EditingSession):
    """A session in which each prompt of the second half of a call has its source in the first."""

    def _read_roles(self, call: ModelCall) -> BatchRoles:
        half, odd = divmod(call.rows, 2)
        if odd:
            raise ValueError(
                f"the original takes a batch for sources and as many targets, got {call.rows} rows: leave "
                'compat="original" out to edit any number of targets of one source'
            )
        return BatchRoles((True,) * call.rows, tuple(range(half)) * 2)


_REGISTERED: WeakKeyDictionary[Any, RegisteredEdit] = WeakKeyDictionary()
