"""CogView 3 Plus and CogView 4: the layers of CogVideoX for one picture.

CogView 4 turns its image's tokens, and guides by a second call, in contexts named "cond" and "uncond"; its texts are
padded on the left, to a multiple of 16 tokens. CogView 3 Plus guides in one call of both halves. Padding counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..text_parts import TextPart
from .adapter import ModelCall
from .cogvideox import blocks_of_one_stream
from .named_calls import NamedCallsAdapter
from .sites import Site
from .transformer import TransformerAdapter

__all__ = ["CogView3PlusAdapter", "CogView4Adapter"]


class _OnePictureAdapter(TransformerAdapter):
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def find_sites(self) -> tuple[Site, ...]:
        return blocks_of_one_stream(self.module)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], sample.shape[-2:], arguments=(args, kwargs))


class CogView3PlusAdapter(_OnePictureAdapter):
    """diffusers' ``CogView3PlusTransformer2DModel``."""

    family = "cogvideox"


class CogView4Adapter(NamedCallsAdapter, _OnePictureAdapter):
    """diffusers' ``CogView4Transformer2DModel``."""

    family = "cogview4"

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        return replace(super().read(args, kwargs), half=self._half())
