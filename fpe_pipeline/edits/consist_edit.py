"""ConsistEdit: a transformer's image queries and keys from the source, and its values where a mask keeps them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Windows, check_compat
from .joint_attention import MaskedJointEdit
from .joint_products import JointProduct, SegmentRows
from .selection import truth_value, unit_number

__all__ = ["ConsistEdit"]


@dataclass(frozen=True)
class ConsistEdit(MaskedJointEdit):
    """ConsistEdit: the structure of the source in the first part of the run, and everything of it where a mask says.

    Text tokens stay each row's own. Of a target's image tokens, in both halves of the batch,

    - in the first ``int(T·alpha)`` steps the queries and keys are the source's;
    - with a mask, whose white parts are kept, the values are the source's there at *every* step, and after those steps
      the queries and keys are as well: ``mask ⊙ source + (1 - mask) ⊙ target``.

    Layers: a FLUX transformer's single blocks, all layers of joint attention of another.

    Args:
        alpha: share of the steps in which the structure is the source's: with the authors 1 keeps it, 0.3 changes style
            and shape, and 0.1 is for real images.
        mask: of what is kept, white; None changes the whole image. A picture's path, a PIL image or an array of the
            image's proportions; or a :class:`WordMask`.
        both_halves: replace in the unconditional half as well, as the authors do.
        compat: ``"original"`` counts every step of FLUX twice, as the authors' code does, so that ``alpha`` covers half
            as many steps there.
        layers: module paths, beginnings of paths, or indices among the layers of joint attention, in their stead.

    Raises:
        ValueError: an ``alpha`` outside [0, 1], a mask that is none; in a session, a UNet, layers that match nothing,
            or a mask of other proportions.

    Reference: Yin et al., "ConsistEdit: Highly Consistent and Precise Training-free Visual Editing", SIGGRAPH Asia
    2025, arXiv 2510.17803.
    """

    alpha: float = 1.0
    both_halves: bool = field(default=True, kw_only=True)
    compat: Literal["original"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_compat(self.compat)
        both = truth_value(self.both_halves, "both_halves")
        self._normalise(alpha=unit_number(self.alpha, "alpha"), both_halves=both)

    def active(self, step: Step) -> bool:
        return self.mask is not None or self._in_window(step, 1)

    def windows(self) -> Windows:
        if self.alpha == 0 and self.mask is None:
            return ()
        return ((f"alpha={self.alpha:g}", self.active),)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        single = tuple(site for site in sites if site.place == "single" and site.kind == "joint")
        return single or super().default_sites(sites)

    def phase(self, step: Step) -> Hashable:
        phase = super().phase(step)
        counts = (1,) if self.compat is None else (1, 2)
        return None if phase is None else tuple(self._in_window(step, count) for count in counts)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Any]:
        twice = self.compat is not None and site.place == "single"
        keeps_structure = self._in_window(step, 2 if twice else 1)
        products = {}
        for source, target in roles.pairs(conditional=None if self.both_halves else True):
            if self.mask is None:
                if keeps_structure:
                    rows = SegmentRows(source, target)
                    products[target] = JointProduct(rows, rows, SegmentRows(target, target))
                continue
            mixed = self.chosen(site, roles, source, target)
            rows = SegmentRows(source if keeps_structure else mixed, target)
            products[target] = JointProduct(rows, rows, SegmentRows(mixed, target))
        return products

    def _in_window(self, step: Step, count: int) -> bool:
        """Whether the structure is the source's, where every step counts as so many."""
        return count * step.place(self.compat) in StepWindow(0.0, self.alpha).steps(step.total)
