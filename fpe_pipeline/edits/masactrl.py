"""MasaCtrl: mutual self-attention."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from .base import Windows
from .joint_products import AnyProduct, JointProduct, SegmentRows
from .products import Product
from .selection import LayerSelection, whole_numbers
from .self_attention import SelfAttentionEdit

__all__ = ["MasaCtrlEdit"]


@dataclass(frozen=True)
class MasaCtrlEdit(SelfAttentionEdit):
    """MasaCtrl: late in the run, targets ask with their own queries for the source's keys and values.

    As algebra, ``AttentionMap(q_target, k_source) @ v_source``, in both halves of the batch: the layout is the
    target prompt's, what things look like is the source's.

    A transformer's layers (Stable Diffusion 3, FLUX) attend to image and text tokens under one softmax. There a
    target's queries ask for the keys and values of its source's *image* tokens beside those of its own text, in layers
    that have to be named: few of them matter, and which is a property of the model. :class:`StableFlowEdit` is the same
    at every step, with the layers for FLUX.1 [dev].

    Args:
        start_step: the first step, counted from 0, as in the original.
        start_layer: the first self-attention layer in execution order, counted from 0. 10 is the first decoder layer
            at 32² tokens of SD 1.x; other UNets count differently.
        steps: the steps themselves, in place of ``start_step``.
        levels, max_tokens, layers: at most one, in place of ``start_layer``; see :class:`FreePromptEdit`.

    References: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and
    Editing", ICCV 2023; for transformers Avrahami et al., "Stable Flow: Vital Layers for Training-Free Image Editing",
    CVPR 2025.
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

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if not any(site.is_joint for site in sites):
            return super().select(sites)
        if self.layers is None:
            raise ValueError(
                f"a transformer's layers have to be named, of which this one has {len(sites)}: pass layers=, indices "
                "or paths, of those that carry what things look like"
            )
        return self.joint_sites(sites)

    def phase(self, step: Step) -> Hashable:
        return ()

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, AnyProduct]:
        pairs = roles.pairs(conditional=None)
        if site.is_joint:
            return {t: JointProduct(SegmentRows(t, t), SegmentRows(s, t), SegmentRows(s, t)) for s, t in pairs}
        return {target: Product(query=target, keys=(source,), values=(source,)) for source, target in pairs}
