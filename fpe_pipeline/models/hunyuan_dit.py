"""HunyuanDiT: blocks of self-attention over image tokens and of cross-attention over text tokens, all of one size.

Queries and keys are turned by their places. A layer's maps are those of a UNet's, and so are its edits and its
processor. The batch is [unconditional, conditional] in one call. Text tokens are those of two encoders, one after the
other, whose prompts the pipeline encodes in a call each; learnt vectors stand in the place of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..text_parts import TextPart
from .adapter import ModelCall
from .sites import Site
from .transformer import TransformerAdapter

__all__ = ["HunyuanDiTAdapter"]


class HunyuanDiTAdapter(TransformerAdapter):
    """diffusers' ``HunyuanDiT2DModel``."""

    family = "unet"
    encodes_in_parts = True
    text_parts = (TextPart("tokenizer", ("text_encoder",)), TextPart("tokenizer_2", ("text_encoder_2",)))

    def find_sites(self) -> tuple[Site, ...]:
        sites: list[Site] = []
        module: Any = self.module
        patch = int(module.config.patch_size)
        for index, block in enumerate(module.blocks):
            path = f"blocks.{index}"
            sites.append(Site(f"{path}.attn1", "single", "self", index, block.attn1.heads, 0, (), patch=patch))
            sites.append(Site(f"{path}.attn2", "single", "cross", index, block.attn2.heads, 0, (), patch=patch))
        return tuple(sites)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = inspect.signature(type(self.module).forward).bind(None, *args, **kwargs).arguments
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], (sample.shape[-2], sample.shape[-1]), arguments=(args, kwargs))
