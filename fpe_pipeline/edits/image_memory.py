"""Stable Flow and FreeFlux: targets attend to the image keys and values of their source, in the layers that matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Windows
from .joint_attention import JointAttentionEdit, MaskedJointEdit, flux_layers
from .joint_products import JointProduct, SegmentRows

__all__ = ["FreeFluxEdit", "StableFlowEdit"]

# Numbers among all blocks of FLUX.1, of which the first 19 are dual.
_VITAL = (0, 1, 17, 18, *(19 + single for single in (6, 9, 34, 35, 37)))
_LAYERS = {
    "non-rigid": (0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56),
    "add": (1, 2, 4, 26, 30, 54, 55),
    "background": tuple(range(57)),
}
# Of 50 steps the authors replace a background in the first 45.
_STEPS = {"non-rigid": 1.0, "add": 1.0, "background": 0.9}


@dataclass(frozen=True)
class StableFlowEdit(JointAttentionEdit):
    """Stable Flow: in a transformer's vital layers, targets ask for the keys and values of their source's image.

    As algebra, ``AttentionMap(q_target, [k_text of target | k_image of source]) @ [v_text of target | v_image of
    source]``: queries and everything of the text stay the target's own.

    Args:
        steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``. Default: all.
        layers: module paths, beginnings of paths, or indices among the layers of joint attention. Default: the authors'
            for FLUX.1 [dev], which are the dual blocks 0, 1, 17, 18 and the single blocks 6, 9, 34, 35, 37.

    Raises:
        ValueError: in a session, a UNet, layers that match nothing, or none named for a transformer that is not
            FLUX.1.

    Reference: Avrahami et al., "Stable Flow: Vital Layers for Training-Free Image Editing", CVPR 2025, arXiv
    2411.14430.
    """

    steps: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise(steps=StepWindow.parse(self.steps))

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.steps)

    def windows(self) -> Windows:
        return () if self.steps[0] == self.steps[1] else ((f"steps={self.steps}", self.active),)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return flux_layers("Stable Flow", _VITAL, sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Any]:
        products = {}
        for source, target in roles.pairs(conditional=None):
            memory = SegmentRows(source, target)
            products[target] = JointProduct(SegmentRows(target, target), memory, memory)
        return products


@dataclass(frozen=True)
class FreeFluxEdit(MaskedJointEdit):
    """FreeFlux: image keys and values of the source, in layers chosen by what they depend on, for each task its own.

    ``"non-rigid"`` and ``"add"`` take the source's image keys and values, as Stable Flow does, in layers that look for
    what is alike rather than for what is near; with a mask those of its white parts alone, so that an added object,
    which is to be black, keeps its own. ``"background"`` takes the *values* of the white parts, which it needs a mask
    for, and keeps queries and keys.

    Args:
        task: what is edited: "non-rigid", "add" or "background".
        steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``. Default: all; for a
            background the first nine tenths.
        mask: which parts of the source are taken: a picture's path, a PIL image or an array of the image's proportions,
            white where the source's tokens are taken; or a :class:`WordMask`.
        layers: module paths, beginnings of paths, or indices among the layers of joint attention. Default: the authors'
            for FLUX.1 [dev], of its 57 blocks 13 for a change of shape, 7 to add an object, and all for a background.

    Raises:
        ValueError: another task, a background without a mask; in a session, a UNet, layers that match nothing, or none
            named for a transformer that is not FLUX.1.

    Reference: Wei et al., "FreeFlux: Understanding and Exploiting Layer-Specific Roles in RoPE-Based MMDiT for
    Versatile Image Editing", ICCV 2025, arXiv 2503.16153.
    """

    task: Literal["non-rigid", "add", "background"] = "non-rigid"
    steps: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in _LAYERS:
            raise ValueError(f"expected task to be one of {', '.join(_LAYERS)}, got {self.task!r}")
        if self.task == "background" and self.mask is None:
            raise ValueError(
                "a background is what a mask says: pass mask=, white where the source's picture is to stay as it is"
            )
        self._normalise(steps=StepWindow.parse(_STEPS[self.task] if self.steps is None else self.steps))

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.steps)

    def windows(self) -> Windows:
        return () if self.steps[0] == self.steps[1] else ((f"steps={self.steps}", self.active),)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return flux_layers(f"FreeFlux ({self.task})", _LAYERS[self.task], sites)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Any]:
        products = {}
        for source, target in roles.pairs(conditional=None):
            own, memory = SegmentRows(target, target), SegmentRows(self.chosen(site, roles, source, target), target)
            products[target] = JointProduct(own, own if self.task == "background" else memory, memory)
        return products
