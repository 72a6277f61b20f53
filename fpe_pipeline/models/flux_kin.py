"""Models whose blocks are FLUX.1's, and what differs around them: Ovis-Image, LongCat-Image and Bria 3.

Ovis-Image and LongCat-Image encode prompts with a language model, inside a text of their own, and guide by a second
call. Bria encodes one prompt at a time with T5, fills it up with zeros, and guides in one call of both halves. None of
them masks its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..text_parts import Template, TextPart, conversation
from .adapter import Half
from .flux import FluxBlocksAdapter

__all__ = ["BriaAdapter", "LongCatImageAdapter", "OvisImageAdapter"]


def _described(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """Ovis-Image's: an instruction and the prompt as what a user says, of which the model receives the latter."""
    said = conversation(pipe.tokenizer, enable_thinking=False, instruction=pipe.system_prompt)
    return said._replace(dropped=pipe.user_prompt_begin_id)


class OvisImageAdapter(FluxBlocksAdapter):
    """diffusers' ``OvisImageTransformer2DModel``."""

    family = "flux_kin"
    kind = "ovis"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _described, is_padded=True),)


def _captioned(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """LongCat-Image's: the text before a prompt and the one behind its padding, of which the model receives neither."""
    if pipe.tokenizer is None:
        return Template("")
    before, after = pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix
    first, behind = (len(pipe.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, after))
    return Template(before, after, first, received=lambda tokens: tokens[:, first : tokens.shape[1] - behind])


class LongCatImageAdapter(FluxBlocksAdapter):
    """diffusers' ``LongCatImageTransformer2DModel``; in LongCat-Image-Edit the words stand behind a picture."""

    family = "flux_kin"
    kind = "longcat"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _captioned, is_padded=True),)

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        if any(kind.__name__ == "LongCatImageEditPipeline" for kind in type(pipe).__mro__):
            self.words_refused = (
                "LongCat-Image-Edit's encoder sees a picture before the prompt, behind which no word is looked for: "
                "use LongCatImagePipeline, or an edit that looks for no words, such as FreePromptEdit or ConsistEdit"
            )


class BriaAdapter(FluxBlocksAdapter):
    """diffusers' ``BriaTransformer2DModel``."""

    family = "flux_kin"
    kind = "bria"
    guides_apart = False
    text_parts = (TextPart("tokenizer", ("text_encoder",), one_at_a_time=True),)

    def _half(self) -> Half:
        return "as guided"
