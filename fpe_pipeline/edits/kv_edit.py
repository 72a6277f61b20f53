"""KV-Edit: the background is the source's, keys, values and latents; what is left is denoised by the target prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from .base import Windows
from .joint_attention import MaskedJointEdit
from .joint_products import JointProduct, MixedRows, SegmentRows
from .masks import MaskImage
from .watchers import Watcher

__all__ = ["KVEdit"]


@dataclass(frozen=True)
class KVEdit(MaskedJointEdit):
    """KV-Edit: where a mask is white everything is the source's, and the rest attends to it.

    As algebra, of targets' image keys and values ``m ⊙ source + (1 - m) ⊙ own`` in layers of joint attention, and after
    every step the latents of white tokens are the source's. The authors compute the black tokens alone, which is the
    same; here the white ones are computed along and put back. Meant for real images::

        inversion = pipe.invert(photo, source)
        pipe(inversion=inversion, target_prompt=target, edit=KVEdit(mask=mask))

    or, without denoising the source again for each edit, for a recording of it,
    ``pipe.record(inversion=inversion, edit=KVEdit(mask=mask))``, which keeps image keys and values, of whichever mask.

    Args:
        mask: the background: a picture's path, a PIL image or an array of the image's proportions, white where the
            source stays as it is. A token is white where half of its part of the image is.
        steps: a number s for the steps ``[0, int(T·s))``, or a pair for ``[int(T·a), int(T·b))``. Default: all.
        layers: module paths, beginnings of paths, or indices among the layers of joint attention. Default: all.

    Raises:
        ValueError: no mask, or one from the heat of a word, which is not known from the first step on; in a session, a
            model without joint attention.

    Reference: Zhu et al., "KV-Edit: Training-Free Image Editing for Precise Background Preservation", ICCV 2025,
    arXiv 2502.17363.
    """

    steps: Any = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mask, MaskImage):
            raise ValueError(
                "KVEdit keeps the background that a picture says: pass mask=, white where the source stays as it is"
            )
        self._normalise(steps=StepWindow.parse(self.steps))

    def active(self, step: Step) -> bool:
        return step in StepWindow(*self.steps)

    def windows(self) -> Windows:
        return () if self.steps[0] == self.steps[1] else ((f"steps={self.steps}", self.active),)

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it."""
        return (_Background(self),)

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Any]:
        products = {}
        for source, target in roles.pairs(conditional=None):
            memory = SegmentRows(MixedRows(source, target, self.white(site, roles, source)), target)
            products[target] = JointProduct(SegmentRows(target, target), memory, memory)
        return products

    def white(self, site: Site, roles: BatchRoles, source: int) -> torch.Tensor:
        """For each image token of a site 1 where it is the source's, and else 0 [N]."""
        weights: torch.Tensor = self.mask.weights(site, roles, source)
        return (weights >= 0.5).to(weights)


class _Background(Watcher):
    """Puts the source's latents back where the mask is white; it reads no maps."""

    blends = True

    def __init__(self, edit: KVEdit) -> None:
        self._edit = edit
        self._site: Site | None = None

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.is_joint)[:1]

    def columns(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, torch.Tensor]:
        self._site = site  # of the latents' size
        return {}

    def blend(self, latents: torch.Tensor, step: Step, roles: BatchRoles) -> torch.Tensor:
        if not self._edit.active(step):
            return latents
        assert self._site is not None and self._site.grid is not None
        # After a step that ended with a call of the unconditional rows alone, its rows are the same images.
        half = any(roles.conditional)
        rows = roles.select(conditional=half)
        if latents.shape[0] != len(rows):
            raise ValueError(f"expected latents of the batch's {len(rows)} images, got {latents.shape[0]} rows")
        out = latents.clone()
        for source, target in roles.pairs(conditional=half):
            white = self._edit.white(self._site, roles, source).bool().to(latents.device)
            if latents.ndim == 3:  # packed: a latent is a token of the layers
                mask = white[:, None]
            else:
                mask = white.view(self._site.frames, *self._site.grid)[0]  # the picture holds for every frame
                for dim in (0, 1):
                    mask = mask.repeat_interleave(self._site.patch, dim)
            here, there = rows.index(target), rows.index(source)
            out[here] = torch.where(mask, latents[there], latents[here])
        return out
