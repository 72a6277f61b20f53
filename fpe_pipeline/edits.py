"""Edits: which product each row of each attention layer gets, at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    levels: int | Iterable[int] | None = None
    max_tokens: int | None = None
    layers: str | int | Iterable[str | int] | None = None

    def __init__(
        self,
        self_replace_steps: Any = 0.8,
        *,
        levels: int | Iterable[int] | None = None,
        max_tokens: int | None = None,
        layers: str | int | Iterable[str | int] | None = None,
    ) -> None:
        window = StepWindow.parse(self_replace_steps)
        selection = LayerSelection("self", levels, max_tokens, layers)  # type: ignore[arg-type]
        for name, value in (
            ("self_replace_steps", (window.start, window.stop)),
            ("levels", selection.levels),
            ("max_tokens", selection.max_tokens),
            ("layers", selection.layers),
        ):
            object.__setattr__(self, name, value)

    @property
    def window(self) -> StepWindow:
        """The steps in which maps are replaced: ``edit.window.steps(total)`` is a range."""
        return StepWindow(*self.self_replace_steps)

    def active(self, step: Step) -> bool:
        return step in self.window

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        selection = LayerSelection("self", self.levels, self.max_tokens, self.layers)  # type: ignore[arg-type]
        if self.levels is None and self.max_tokens is None and self.layers is None:
            deepest = max((site.level for site in sites), default=0)
            selection = LayerSelection("self", levels=tuple(range(1, max(deepest, 1) + 1)))
        return selection.match(sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        return {target: Product(query=source, keys=(source,), values=(target,)) for source, target in roles.pairs()}
