"""CogVideoX: blocks with one softmax over the text's tokens and those of all frames of a video, text first.

Image and text tokens have norms of their own before a layer and one set of projections in it. The batch is
[unconditional, conditional] in one call, and texts end in padding that is attended to. A token of CogVideoX 1.5 is of
two frames of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["CogVideoXAdapter", "joint_layers"]


def joint_layers(module: Any) -> tuple[Site, ...]:
    """The layers, ``attn1``, of a transformer whose every block attends to image and text tokens together."""
    patch = int(module.config.patch_size)
    return tuple(
        Site(f"transformer_blocks.{index}.attn1", "dual", "joint", index, block.attn1.heads, 0, (), patch=patch)
        for index, block in enumerate(module.transformer_blocks)
    )


class CogVideoXAdapter(TransformerAdapter):
    """diffusers' ``CogVideoXTransformer3DModel``."""

    family = "cogvideox"
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def find_sites(self) -> tuple[Site, ...]:
        return joint_layers(self.module)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample, together = given["hidden_states"], module.config.patch_size_t or 1
        frames, (height, width) = sample.shape[1], sample.shape[-2:]
        if frames % together:
            raise ValueError(
                f"expected latents of a multiple of {together} frames, which this model takes together, got {frames}"
            )
        return ModelCall(sample, given["timestep"], (height, width, frames // together), arguments=(args, kwargs))
