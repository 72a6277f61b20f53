"""Stable Diffusion 3 and 3.5: blocks with a stream of image tokens and one of text tokens, and one softmax over both.

The order in a layer is image, text. The batch is [unconditional, conditional] in one call; skip-layer guidance makes a
second call of the conditional rows alone, without some of the blocks. SD 3.5 medium has blocks with a second layer,
``attn2``, in which image tokens attend to one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["SD3Adapter"]


class SD3Adapter(TransformerAdapter):
    """diffusers' ``SD3Transformer2DModel``."""

    family = "sd3"
    text_parts = (
        TextPart("tokenizer", ("text_encoder", "text_encoder_2")),
        TextPart("tokenizer_3", ("text_encoder_3",)),
    )

    def find_sites(self) -> tuple[Site, ...]:
        sites: list[Site] = []
        module: Any = self.module
        patch, images = int(module.config.patch_size), 0
        for index, block in enumerate(module.transformer_blocks):
            path = f"transformer_blocks.{index}"
            sites.append(Site(f"{path}.attn", "dual", "joint", index, block.attn.heads, 0, (), patch=patch))
            if block.attn2 is not None:
                sites.append(Site(f"{path}.attn2", "dual", "image", images, block.attn2.heads, 0, (), patch=patch))
                images += 1
        return tuple(sites)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, skipped = given["hidden_states"], given.get("skip_layers")
        return ModelCall(
            sample,
            given["timestep"],
            (sample.shape[-2], sample.shape[-1]),
            # diffusers skips layers in a call of its own, of the rows that see their prompts.
            half="as guided" if skipped is None else "conditional",
            left_out=tuple(f"transformer_blocks.{index}" for index in skipped or ()),
            arguments=(args, kwargs),
        )
