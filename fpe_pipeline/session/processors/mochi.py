"""The attention processor that computes an edit's joint products in the blocks of Mochi."""

from __future__ import annotations

from typing import Any

from ..layers.places import Turn, by_heads
from .hunyuan_video import EditHunyuanVideoProcessor

__all__ = ["EditMochiProcessor"]


class EditMochiProcessor(EditHunyuanVideoProcessor):
    """Drop-in processor for diffusers' ``MochiAttention``, wrapped around the one that a layer already has.

    It does as that of HunyuanVideo does, of heads that are turned by angles of their own.
    """

    plain = ("MochiAttnProcessor2_0",)

    def turn(self, places: Any) -> Turn | None:
        return by_heads(places)
