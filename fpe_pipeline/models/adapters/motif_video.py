"""Motif-Video: dual and single blocks with one softmax over the tokens of all frames and the text.

Padding of texts is masked. Blocks may attend to the text a second time, and the last ones, its decoder, to what the
others made of the frames in the text's place: both are left as they are. A guider says how often the model is called
in a step, and in which contexts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart, plain_tokenizer
from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .hunyuan_guided import GuidedAdapter
from .padding import counted_tokens

__all__ = ["MotifVideoAdapter"]

_OTHERS = "use an edit that looks for none, such as FreePromptEdit or MasaCtrlEdit"


class MotifVideoAdapter(GuidedAdapter):
    """diffusers' ``MotifVideoTransformer3DModel``."""

    family = "motif_video"
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        self.words_refused = self._without_words()

    def _without_words(self) -> str:
        """Why no word is looked for; empty where words are."""
        config: Any = self.module.config
        if config.enable_text_cross_attention_dual or config.enable_text_cross_attention_single:
            return (
                "blocks of this model attend to the text a second time, beside the softmax over image and text, where "
                f"no edit of words reaches: {_OTHERS}"
            )
        if "image" in inspect.signature(type(self.pipe).__call__).parameters:
            return f"tokens of a picture stand before those of the text, among which no word is looked for: {_OTHERS}"
        tokenizer = plain_tokenizer(getattr(self.pipe, "tokenizer", None))
        if getattr(tokenizer, "padding_side", "right") != "right":
            return (
                "texts are padded in front, and words are found in those that are padded behind: "
                'pipe.tokenizer.padding_side = "right"'
            )
        return ""

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        sites = dual_and_single(module, int(module.config.patch_size))
        return sites[: len(sites) - module.config.num_decoder_layers]

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample, mask, picture = given["hidden_states"], given.get("encoder_attention_mask"), given.get("image_embeds")
        frames, height, width = sample.shape[-3:]
        shown = 0 if picture is None else picture.shape[1]
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // module.config.patch_size_t),
            half=self._half(),
            text_lengths=None if mask is None else tuple(shown + count for count in counted_tokens(mask)),
            arguments=(args, kwargs),
        )
