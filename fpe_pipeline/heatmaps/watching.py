"""A watcher in the calls of a pipeline, of which nothing is edited for its sake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..edits import Edit
from ..edits.base import Windows
from ..edits.products import Product
from ..edits.watchers import Watcher
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..session.session import EditingSession, session_of

__all__ = ["Unedited", "WatchingSession", "check_options", "watching"]


@dataclass(frozen=True)
class Unedited(Edit):
    """Every layer as it is."""

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return ()

    def active(self, step: Step) -> bool:
        return False

    def windows(self) -> Windows:
        return ()

    @property
    def pairs_pixels(self) -> bool:
        return False

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {}


class WatchingSession(EditingSession):
    """Nothing is edited; a session that is entered inside it, a `FreePromptPipeline` call's own too, is watched."""

    gives_way = True


def check_options(pipe: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a session where one is open, which has its own."""
    if options and session_of(pipe) is not None:
        raise ValueError(f"the session is open already: give it {', '.join(sorted(options))}")


@contextmanager
def watching(pipe: Any, watcher: Watcher, **options: Any) -> Iterator[EditingSession]:
    """Let a watcher follow a pipeline's calls in a ``with`` block, in the session that is open or in one of its own.

    Args:
        pipe: a diffusers pipeline with a UNet.
        watcher: reads maps.
        **options: of `EditingSession`; not inside a session.
    """
    check_options(pipe, options)
    session = session_of(pipe)
    if session is None:
        with WatchingSession(pipe, Unedited(), **options) as session:
            session.watch(watcher)
            yield session
        return
    session.watch(watcher)
    try:
        yield session
    finally:
        session.unwatch(watcher)
