"""The layers that an edit or a watcher selects, found once for each size of latent."""

from __future__ import annotations

from collections.abc import Callable

from ..edits import Edit
from ..edits.watchers import Watcher
from ..models.sites import Site

__all__ = ["SelectedSites"]


class SelectedSites:
    """What an edit and its watchers select, each of which can be computed.

    Args:
        sites: of the model, of no size.
        check: raises for sites that cannot be computed.
    """

    def __init__(self, sites: tuple[Site, ...], check: Callable[[tuple[Site, ...]], None]) -> None:
        self._sites, self._check = sites, check
        self._found: dict[tuple[int, ...], tuple[Edit | Watcher, tuple[Site, ...]]] = {}

    def of(self, who: Edit | Watcher, size: tuple[int, ...]) -> tuple[Site, ...]:
        """The sites that ``who`` selects for latents of ``size``, as :meth:`.Site.at` takes it."""
        key = (id(who), *size)
        if key not in self._found:
            sites = who.select(tuple(site.at(*size) for site in self._sites))
            self._check(sites)
            self._found[key] = who, sites  # held, so that the id stays its own
        return self._found[key][1]

    def forget(self, *who: Edit | Watcher) -> None:
        """Leave out what they selected; they will not be asked again."""
        gone = set(map(id, who))
        self._found = {key: found for key, found in self._found.items() if key[0] not in gone}

    def clear(self) -> None:
        """Ask everyone anew."""
        self._found = {}
