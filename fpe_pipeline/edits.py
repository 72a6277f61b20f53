"""Edits: which product each row of each attention layer gets, at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .products import Product
from .roles import BatchRoles
from .schedule import Step, StepWindow
from .selection import LayerSelection
from .sites import Site

__all__ = ["Edit", "FreePromptEdit"]


@dataclass(frozen=True)
class Edit(ABC):
    """An edit of a UNet's attention, as a pure function of site, step and roles.

    A subclass writes :meth:`products`; :meth:`select` and :meth:`active` narrow where and when it is asked.
    """

    @abstractmethod
    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product | Sequence[Product]]:
        """What the rows of a layer become; rows left out stay as they are, and an empty mapping leaves the
        layer to the processor it had before."""

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites that the edit is asked about. It raises where none is left.

        A session calls it once without sizes (``site.grid`` is None) and again for every size of latent.
        """
        return sites

    def active(self, step: Step) -> bool:
        """Whether the edit is asked at this step; elsewhere the batch may have any layout."""
        return True


@dataclass(frozen=True)
class FreePromptEdit(Edit):
    """Free-Prompt-Editing: in self-attention layers, a target's attention map is its source's.

    As algebra, ``A_source @ v_target`` for the target rows of the conditional half; cross-attention and the
    unconditional half stay as they are.

    Args:
        self_replace_steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``.
        levels: how often the replaced layers' input is downsampled from the latent: an int or several. Default:
            all levels from 1 on, which is what the method's limit of 32² tokens means at 512 px.
        max_tokens: replace layers of at most so many tokens, as the original does (32², at any image size).
        layers: module paths, beginnings of paths, or indices among the self-attention layers.

    Reference: Liu et al., "Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided
    Image Editing", CVPR 2024.
    """

    self_replace_steps: Any = 0.8
    levels: int | Iterable[int] | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        window = StepWindow.parse(self.self_replace_steps)
        selection = self._selection()
        normalised = {
            "self_replace_steps": (window.start, window.stop),
            "levels": selection.levels,
            "max_tokens": selection.max_tokens,
            "layers": selection.layers,
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)  # the way to do it in a frozen dataclass

    @property
    def window(self) -> StepWindow:
        """The steps in which maps are replaced: ``edit.window.steps(total)`` is a range."""
        return StepWindow(*self.self_replace_steps)

    def active(self, step: Step) -> bool:
        return step in self.window

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        deepest = max((site.level for site in sites), default=1)
        return self._selection(default_levels=range(1, max(deepest, 1) + 1)).match(sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {target: Product(query=source, keys=(source,), values=(target,)) for source, target in roles.pairs()}

    def _selection(self, default_levels: Iterable[int] | None = None) -> LayerSelection:
        chosen: dict[str, Any] = {"levels": self.levels, "max_tokens": self.max_tokens, "layers": self.layers}
        if all(value is None for value in chosen.values()):
            chosen["levels"] = default_levels
        return LayerSelection.parse("self", **chosen)
