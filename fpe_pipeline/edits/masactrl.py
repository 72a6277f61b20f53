"""MasaCtrl: mutual self-attention."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from .base import Windows
from .products import Product
from .selection import LayerSelection, whole_numbers
from .self_attention import SelfAttentionEdit

__all__ = ["MasaCtrlEdit"]


@dataclass(frozen=True)
class MasaCtrlEdit(SelfAttentionEdit):
    """MasaCtrl: late in the run, targets ask with their own queries for the source's keys and values.

    As algebra, ``AttentionMap(q_target, k_source) @ v_source``, in both halves of the batch: the layout is the
    target prompt's, what things look like is the source's.

    Args:
        start_step: the first step, counted from 0, as in the original.
        start_layer: the first self-attention layer in execution order, counted from 0. 10 is the first decoder layer
            at 32² tokens of SD 1.x; other UNets count differently.
        steps: the steps themselves, in place of ``start_step``.
        levels, max_tokens, layers: at most one, in place of ``start_layer``; see :class:`FreePromptEdit`.

    Reference: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and
    Editing", ICCV 2023.
    """

    start_step: int = 4
    start_layer: int = 10
    steps: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        (start_step,), (start_layer,) = (whole_numbers(n, [getattr(self, n)]) for n in ("start_step", "start_layer"))
        self._normalise(start_step=start_step, start_layer=start_layer)
        if self.steps is not None:
            self._normalise(steps=whole_numbers("steps", self.steps))

    def active(self, step: Step) -> bool:
        return step.index >= self.start_step if self.steps is None else step.index in self.steps

    def windows(self) -> Windows:
        if self.max_tokens == 0:
            return ()
        return ((f"start_step={self.start_step}" if self.steps is None else f"steps={self.steps}", self.active),)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = tuple(s for s in LayerSelection.parse("self").match(sites) if s.index >= self.start_layer)
        if not chosen:
            raise ValueError(
                f"start_layer={self.start_layer} is past the last of the UNet's "
                f"{sum(site.kind == 'self' for site in sites)} self-attention layers: name a lower one, or layers="
            )
        return chosen

    def phase(self, step: Step) -> Hashable:
        return ()

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        pairs = roles.pairs(conditional=None)
        return {target: Product(query=target, keys=(source,), values=(source,)) for source, target in pairs}
