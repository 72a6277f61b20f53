"""Allegro: blocks of self-attention over all tokens of a video and of cross-attention over its text, whose padding is
masked. The batch is [unconditional, conditional] in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sites import Site
from .adapter import ModelCall
from .transformer import TransformerAdapter, self_and_cross

__all__ = ["AllegroAdapter"]


class AllegroAdapter(TransformerAdapter):
    """diffusers' ``AllegroTransformer3DModel``."""

    family = "allegro"

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("transformer_blocks", module.transformer_blocks, int(module.config.patch_size)))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        size = (height, width, frames // module.config.patch_size_t)
        return ModelCall(sample, given["timestep"], size, arguments=(args, kwargs))
