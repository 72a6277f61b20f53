"""Nucleus-Image: blocks in which image tokens attend to themselves and to text, whose tokens look at nothing.

Each block makes keys and values of the text anew. Several heads of queries share one of keys and values. A prompt
stands inside a conversation, and what counts of a text is told by a mask. Experts take tokens within a row, so that
rows do not change one another. The pipeline guides by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import counted_tokens

__all__ = ["NucleusImageAdapter"]


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = pipe._format_prompt("{}").partition("{}")
    return Template(before, after)


class NucleusImageAdapter(NamedCallsAdapter):
    """diffusers' ``NucleusMoEImageTransformer2DModel``."""

    family = "nucleus"
    text_parts = (TextPart("processor", ("text_encoder",), _conversation),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(module.config.patch_size)
        return tuple(
            Site(f"transformer_blocks.{index}.attn", "single", "joint", index, block.attn.heads, 0, (), patch=patch)
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, shapes = given["hidden_states"], given["img_shapes"]
        frames, height, width = shapes[0] if isinstance(shapes, list) else shapes
        if frames * height * width != sample.shape[1] or frames != 1:
            raise ValueError(
                f"the model got {sample.shape[1]} image tokens of an image that is said to be {frames} x {height} x "
                f"{width} of them (img_shapes): an edit knows one picture a row"
            )
        patch, mask = self.sites[0].patch, given.get("encoder_hidden_states_mask")
        return ModelCall(
            sample,
            given["timestep"],
            (height * patch, width * patch),
            half=self._half(),
            text_lengths=None if mask is None else counted_tokens(mask),
            arguments=(args, kwargs),
        )
