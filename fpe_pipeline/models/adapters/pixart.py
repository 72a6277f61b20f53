"""PixArt: blocks of self-attention over image tokens and of cross-attention over text tokens, all of one size.

A layer's maps are those of a UNet's, and so are its edits and its processor. The batch is [unconditional, conditional]
in one call, and the timestep is the scheduler's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sites import Site
from .adapter import ModelCall
from .transformer import TransformerAdapter, self_and_cross

__all__ = ["PixArtAdapter"]


class PixArtAdapter(TransformerAdapter):
    """diffusers' ``PixArtTransformer2DModel``."""

    family = "unet"

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks, int(module.config.patch_size)))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], (sample.shape[-2], sample.shape[-1]), arguments=(args, kwargs))
