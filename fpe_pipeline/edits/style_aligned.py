"""StyleAligned: shared self-attention."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Windows
from .products import Product
from .selection import truth_value
from .self_attention import SelfAttentionEdit

__all__ = ["StyleAlignedEdit"]


@dataclass(frozen=True)
class StyleAlignedEdit(SelfAttentionEdit):
    """StyleAligned: every image of a batch also attends to the reference, which gives them one style.

    As algebra, ``AttentionMap(q', [k_reference ‖ k']) @ [v_reference ‖ v]`` in both halves of the batch, where q' and
    k' have the reference's mean and deviation over tokens (adaptive instance normalisation). Images differ in
    content, so their start noise may differ.

    Args:
        steps: a number s for the steps ``[0, int(T·s))``, or a pair. Default: all.
        normalise: whether queries and keys take the reference's statistics.
        shared_score_shift: added to the scores of the reference's tokens (natural-log units): ``log(2)`` makes the
            reference count twice, negative numbers lessen its pull.
        levels, max_tokens, layers: at most one, to choose layers; default: every self-attention layer. See
            :class:`FreePromptEdit`.

    Reference: Hertz et al., "Style Aligned Image Generation via Shared Attention", CVPR 2024. The authors' code can
    also share the statistics of group and layer norms between images, which is no part of attention and not done here.
    """

    steps: Any = 1.0
    normalise: bool = True
    shared_score_shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise = truth_value(self.normalise, "normalise")
        self._normalise(steps=StepWindow.parse(self.steps), normalise=normalise)
        if not isfinite(self.shared_score_shift):
            raise ValueError(f"expected shared_score_shift to be a finite number, got {self.shared_score_shift}")

    @property
    def pairs_pixels(self) -> bool:
        return False

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.steps)

    def phase(self, step: Step) -> Hashable:
        return ()

    def windows(self) -> Windows:
        start, stop = self.steps
        return () if start == stop or self.max_tokens == 0 else ((f"steps={self.steps}", self.active),)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        shifts = (float(self.shared_score_shift), 0.0) if self.shared_score_shift else ()
        return {
            row: Product(row, (source, row), (source, row), style=source if self.normalise else None, shifts=shifts)
            for source, row in roles.pairs(conditional=None)
        }
