"""Mochi: blocks with a wide stream of image tokens and a narrow one of text tokens, and one softmax over both.

The order in a layer is image, text, and the image's tokens are those of all frames, which each head turns by angles of
its own. The batch is [unconditional, conditional] in one call; padding of texts is left out, and a text may be padding
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall
from .cogvideox import joint_layers
from .padding import text_lengths
from .transformer import TransformerAdapter

__all__ = ["MochiAdapter"]


class MochiAdapter(TransformerAdapter):
    """diffusers' ``MochiTransformer3DModel``."""

    family = "mochi"
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def find_sites(self) -> tuple[Site, ...]:
        return joint_layers(self.module)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        lengths = text_lengths(given["encoder_attention_mask"])
        size = (height, width, frames)
        return ModelCall(sample, given["timestep"], size, text_lengths=lengths, arguments=(args, kwargs))

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)
