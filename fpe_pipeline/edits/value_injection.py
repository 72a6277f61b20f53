"""RF-Solver-Edit's and FireFlow's rule: what a target's own maps bring together is the source's."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Windows
from .joint_products import JointProduct, SegmentRows
from .self_attention import SelfAttentionEdit

__all__ = ["ValueInjectionEdit"]

# Of the 38 blocks of FLUX.1 with one stream.
_LATE = tuple(f"single_transformer_blocks.{index}" for index in range(20, 38))


@dataclass(frozen=True)
class ValueInjectionEdit(SelfAttentionEdit):
    """Early in the run, the values of a target's late layers are its source's, of image and of text.

    As algebra, ``A_target @ v_source`` in layers of joint attention: where tokens look is the target prompt's, what
    they find there is the source's. Meant for real images, whose source is put back onto its inverted trajectory at
    every step::

        inversion = pipe.invert(photo, source)
        pipe(inversion=inversion, target_prompt=target, edit=ValueInjectionEdit())

    or, without denoising the source again for each edit, for a recording of it,
    ``pipe.record(inversion=inversion, edit=ValueInjectionEdit())``, which keeps values alone.

    Args:
        inject_steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``.
        levels, max_tokens: nothing for a transformer.
        layers: module paths, beginnings of paths, or indices among the layers. Default: FLUX.1's single blocks 20 to
            37; other models' have to be named.

    References: Wang et al., "Taming Rectified Flow for Inversion and Editing", ICML 2025; Deng et al., "FireFlow: Fast
    Inversion of Rectified Flow for Image Semantic Editing", ICML 2025.
    """

    inject_steps: Any = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._normalise(inject_steps=StepWindow.parse(self.inject_steps))

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.inject_steps)

    def windows(self) -> Windows:
        start, stop = self.inject_steps
        return () if start == stop else ((f"inject_steps={self.inject_steps}", self.active),)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if not any(site.is_joint for site in sites):
            raise ValueError(
                "ValueInjectionEdit takes values of image and text tokens that attend together, and a UNet has no such "
                "layers: MasaCtrlEdit takes keys and values of its self-attention"
            )
        if self.layers is not None or self.levels is not None:
            return self.joint_sites(sites)
        late = tuple(site for site in sites if site.path.removesuffix(".attn") in _LATE)
        if len(late) < len(_LATE):
            raise ValueError(
                f"the layers whose values are taken are FLUX.1's single blocks 20 to 37, and this transformer with its "
                f"{len(sites)} layers is another: name its late layers with layers=, indices or paths"
            )
        return late

    def phase(self, step: Step) -> Hashable:
        return ()

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, JointProduct]:
        products = {}
        for source, target in roles.pairs(conditional=None):
            own = SegmentRows(target, target)
            products[target] = JointProduct(own, own, SegmentRows(source, source))
        return products
