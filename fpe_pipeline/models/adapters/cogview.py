"""CogView 3 Plus, CogView 4 and GLM-Image: the layers of CogVideoX for one picture.

CogView 4 turns its image's tokens, and guides by a second call, in contexts named "cond" and "uncond"; its texts are
padded on the left, to a multiple of 16 tokens. CogView 3 Plus guides in one call of both halves. Padding counts.

GLM-Image has CogView 4's layers. What a prompt says has been made tokens of a layout before, by another model, which
are added to those of the image; its text tokens are what the prompt quotes, letter by letter. Its second call follows
the first. Pictures that it is shown are keys and values that it keeps from a call for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...text_parts import TextPart
from ..sites import Site
from .adapter import ModelCall
from .cogvideox import joint_layers
from .named_calls import NamedCallsAdapter
from .transformer import TransformerAdapter

__all__ = ["CogView3PlusAdapter", "CogView4Adapter", "GlmImageAdapter"]


class _OnePictureAdapter(TransformerAdapter):
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def find_sites(self) -> tuple[Site, ...]:
        return joint_layers(self.module)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        return ModelCall(sample, given["timestep"], sample.shape[-2:], arguments=(args, kwargs))


class CogView3PlusAdapter(_OnePictureAdapter):
    """diffusers' ``CogView3PlusTransformer2DModel``."""

    family = "cogvideox"
    kind = "cogview3"


class _OfTwoCallsAdapter(NamedCallsAdapter, _OnePictureAdapter):
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        return replace(super().read(args, kwargs), half=self._half())


class CogView4Adapter(_OfTwoCallsAdapter):
    """diffusers' ``CogView4Transformer2DModel``."""

    family = "cogview4"


class GlmImageAdapter(_OfTwoCallsAdapter):
    """diffusers' ``GlmImageTransformer2DModel``."""

    family = "glm_image"
    words_refused = (
        "GLM-Image's denoiser reads the layout that another model made of a prompt, and of its text what it quotes "
        "alone, so that no word is looked for: use an edit that looks for no words, such as FreePromptEdit or "
        "ConsistEdit"
    )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        kept = self.named(args, kwargs).get("kv_caches")
        if kept is not None and any(layer.mode in ("write", "read") for layer in kept.caches):
            raise ValueError(
                "GLM-Image keeps keys and values of the pictures that it is shown (image=), which stand before every "
                "row's text in its calls with prompts and in no others; an edit does not know them: pass prompts alone"
            )
        return super().read(args, kwargs)
