"""FLUX.2: the layers of FLUX.1, of which single blocks project queries, keys, values and feed-forward at once.

Places of tokens have four coordinates: picture, row, column and place in the text; tokens of reference pictures follow
those that are denoised. Prompts stand in a conversation, and every text is padded to one length. FLUX.2 [dev] has its
guidance in the model; [klein] guides by a second call, in contexts named "cond" and "uncond".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..text_parts import Template, TextPart, conversation
from .adapter import ModelCall
from .flux import FluxBlocksAdapter

__all__ = ["Flux2Adapter", "is_klein"]

_KLEIN = "Flux2Klein"


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """What [klein]'s pipeline writes around a prompt; nothing where it reads none."""
    return conversation(pipe.tokenizer, enable_thinking=False)


def is_klein(pipe: Any) -> bool:
    """Whether a pipeline is of FLUX.2 [klein], and not of [dev]."""
    return any(kind.__name__.startswith(_KLEIN) for kind in type(pipe).__mro__)


class Flux2Adapter(FluxBlocksAdapter):
    """diffusers' ``Flux2Transformer2DModel``."""

    family = "flux2"

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        if is_klein(pipe):
            self.text_parts = (TextPart("tokenizer", ("text_encoder",), _conversation, is_padded=True),)
        else:
            self.words_refused = (
                "FLUX.2's prompts stand in a conversation that its pipeline writes, in which no word is looked for but "
                "in [klein]'s: use an edit of image tokens, such as FreePromptEdit or ConsistEdit, with a picture "
                "where it takes a mask"
            )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        if kwargs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} keeps keys and values of its reference pictures from step to step, of "
                "which an edit would know nothing: edit with Flux2KleinPipeline, which computes them at each step"
            )
        return super().read(args, kwargs)
