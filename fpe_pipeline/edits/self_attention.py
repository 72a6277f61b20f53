"""Edits of self-attention, and how they are told which layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..models.sites import Kind, Site
from .base import Edit
from .selection import LayerSelection, refuse_transformer

__all__ = ["SelfAttentionEdit"]


@dataclass(frozen=True)
class SelfAttentionEdit(Edit):
    """An edit of self-attention layers, which at most one of three arguments selects.

    Args:
        levels: how often the edited layers' input is downsampled from the latent: an int or several.
        max_tokens: edit layers of at most so many tokens, at any image size; 0 for no layer.
        layers: module paths, beginnings of paths, or indices among the self-attention layers.
    """

    levels: int | Iterable[int] | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        selection = self._selection()
        self._normalise(levels=selection.levels, max_tokens=selection.max_tokens, layers=selection.layers)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        refuse_transformer("self", sites)
        if all(value is None for value in (self.levels, self.max_tokens, self.layers)):
            return self.default_sites(sites)
        return self._selection().match(sites)

    def joint_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The transformer's layers that are selected, for an edit that has a rule for them."""
        if self.levels is not None:
            raise ValueError(
                f"levels={self.levels} tell resolutions apart, and a transformer has one: choose layers with layers="
            )
        return self._selection("joint").match(sites)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The layers that are edited where none of the three arguments is given: all of self-attention."""
        return self._selection().match(sites, by_default=True)

    def _selection(self, kind: Kind = "self") -> LayerSelection:
        return LayerSelection.parse(kind, levels=self.levels, max_tokens=self.max_tokens, layers=self.layers)
