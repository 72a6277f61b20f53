"""Chroma: FLUX.1's dual and single blocks, of which the padding of texts is told apart by a mask.

The order in a layer is text, image, and texts of every length are padded to one, so that what is masked stands in the
middle: a row's mask is ones for its text and for the one token of padding that Chroma keeps, zeros for the rest of the
padding, and ones for the image. As truth values it takes the attention of what it leaves out. As numbers, which
diffusers' pipelines make of it, it is added to the scores: padding still takes attention, e times less than scores give
it. Both are computed as they are. The pipelines guide by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...text_parts import TextPart
from .adapter import ModelCall
from .flux import FluxBlocksAdapter
from .padding import lengths_before_images

__all__ = ["ChromaAdapter"]


class ChromaAdapter(FluxBlocksAdapter):
    """diffusers' ``ChromaTransformer2DModel``."""

    family = "chroma"
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        call, given = super().read(args, kwargs), self.named(args, kwargs)
        if call.references:
            raise ValueError(
                f"the model got {call.references} tokens of reference pictures, and Chroma has none: leave them out"
            )
        mask = given.get("attention_mask")
        if mask is None:
            return call
        lengths = lengths_before_images(mask, given["encoder_hidden_states"].shape[1], *call.sample.shape[:2])
        # Where the mask is numbers, each layer is told them and no key is left out.
        return replace(call, text_lengths=lengths) if mask.dtype == torch.bool else call
