"""Edits of a transformer's joint attention, and how they are told which layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..models.roles import BatchRoles
from ..models.sites import Site, describe_sites
from ..models.steps import Step
from ..prompts.encoding import Encoding
from .base import Edit
from .joint_products import MixedRows
from .masks import MaskImage, RunningWordMask, WordMask
from .selection import LayerSelection
from .watchers import Watcher

__all__ = ["JointAttentionEdit", "MaskedJointEdit", "flux_layers"]

#: Blocks of FLUX.1, dual and single, that published lists of layers count through.
_FLUX_BLOCKS = (19, 38)


@dataclass(frozen=True)
class JointAttentionEdit(Edit):
    """An edit of layers in which image and text tokens attend under one softmax.

    Args:
        layers: module paths, beginnings of paths, or indices among the layers of joint attention, counted through.
    """

    layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._normalise(layers=LayerSelection.parse("joint", layers=self.layers).layers)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        joint = tuple(site for site in sites if site.is_joint)
        if not joint:
            raise ValueError(
                f"{type(self).__name__} edits layers in which image and text tokens attend together, of which "
                "this model has none: use FreePromptEdit, MasaCtrlEdit or PromptToPromptEdit, or a pipeline with a "
                "transformer (Stable Diffusion 3, FLUX.1, Qwen-Image)"
            )
        if self.layers is None:
            return self.default_sites(joint)
        return LayerSelection.parse("joint", layers=self.layers).match(joint)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The layers that are edited where none are named: all of joint attention."""
        return LayerSelection.parse("joint").match(sites)

    def phase(self, step: Step) -> Hashable:
        return (self.active(step),)


@dataclass(frozen=True)
class MaskedJointEdit(JointAttentionEdit):
    """One that takes some image tokens of the source, and others of the target, by a mask.

    Args:
        mask: which parts of the source are taken: a picture's path, a PIL image or an array of the image's
            proportions, white where the source's tokens are taken; or a :class:`WordMask`.
    """

    mask: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None and not isinstance(self.mask, MaskImage | WordMask | RunningWordMask):
            self._normalise(mask=MaskImage(self.mask))

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it is written for, the source's first."""
        return (self.mask.prompt,) if isinstance(self.mask, WordMask) else ()

    def encoded(self, encoding: Encoding) -> Edit:
        """The edit for what the pipeline encodes."""
        return self  # a mask's watcher places its word

    def begin(self) -> Edit:
        """What a session asks for the length of its ``with`` block."""
        return replace(self, mask=self.mask.begin()) if isinstance(self.mask, WordMask) else self

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it."""
        return (self.mask.collector,) if isinstance(self.mask, RunningWordMask) else ()

    def phase(self, step: Step) -> Hashable:
        return super().phase(step) if isinstance(self.mask, MaskImage | None) else None

    def chosen(self, site: Site, roles: BatchRoles, source: int, target: int) -> int | MixedRows:
        """The image tokens that the mask chooses of a source and a target; the source's where there is none."""
        if self.mask is None:
            return source
        mask = self.mask.begin() if isinstance(self.mask, WordMask) else self.mask
        share: torch.Tensor = mask.weights(site, roles, source)
        return MixedRows(source, target, share)


def flux_layers(edit: str, indices: Iterable[int], sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Layers of FLUX.1 by their number among all of its blocks, the dual ones first.

    Raises:
        ValueError: a transformer of other blocks, of which the numbers say nothing.
    """
    blocks = tuple(sum(site.place == place for site in sites) for place in ("dual", "single"))
    if blocks != _FLUX_BLOCKS:
        raise ValueError(
            f"the layers of {edit} are known for FLUX.1, which has {_FLUX_BLOCKS[0]} dual and {_FLUX_BLOCKS[1]} single "
            f"blocks; this transformer has {blocks[0]} and {blocks[1]}: name those that carry what things look like "
            f"with layers=\n{describe_sites(sites)}"
        )
    return LayerSelection.parse("joint", layers=tuple(indices)).match(sites)
