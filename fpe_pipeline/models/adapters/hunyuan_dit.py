"""HunyuanDiT: blocks of self-attention over image tokens and of cross-attention over text tokens, all of one size.

Queries and keys are turned by their places. A layer's maps are those of a UNet's, and so are its edits and its
processor. The batch is [unconditional, conditional] in one call. Text tokens are those of two encoders, one after the
other, whose prompts the pipeline encodes in a call each; learnt vectors stand in the place of padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site
from .adapter import ModelCall
from .transformer import TransformerAdapter, self_and_cross

__all__ = ["HunyuanDiTAdapter"]


class HunyuanDiTAdapter(TransformerAdapter):
    """diffusers' ``HunyuanDiT2DModel``."""

    family = "unet"
    encodes_in_parts = True
    text_parts = (TextPart("tokenizer", ("text_encoder",)), TextPart("tokenizer_2", ("text_encoder_2",)))

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(self_and_cross("blocks", module.blocks, int(module.config.patch_size)))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], (sample.shape[-2], sample.shape[-1]), arguments=(args, kwargs))
