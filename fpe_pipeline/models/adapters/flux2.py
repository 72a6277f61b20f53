"""FLUX.2: the layers of FLUX.1, of which single blocks project queries, keys, values and feed-forward at once.

Places of tokens have four coordinates: picture, row, column and place in the text; tokens of reference pictures follow
those that are denoised. Prompts stand in a conversation, and every text is padded to one length, on either side. FLUX.2
[dev] has its guidance in the model; [klein] guides by a second call, in contexts named "cond" and "uncond".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart, conversation, plain_tokenizer
from .adapter import ModelCall
from .flux import FluxBlocksAdapter

__all__ = ["Flux2Adapter", "is_klein"]

_KLEIN = "Flux2Klein"


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """What the pipeline writes around a prompt; nothing where it reads none."""
    if is_klein(pipe) or pipe.tokenizer is None:
        return conversation(pipe.tokenizer, enable_thinking=False)
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input  # which older versions lack

    said = format_input(["{}"], pipe.system_message)
    (written,) = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=False, tokenize=False)
    before, _, after = written.rpartition("{}")  # behind what the system says
    tokenizer = plain_tokenizer(pipe.tokenizer)
    if _begins_texts(tokenizer):  # not twice, as the processor takes care of
        before = before.removeprefix(tokenizer.bos_token)
    return Template(before, after)


def _begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer writes its first token before every text."""
    return tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def is_klein(pipe: Any) -> bool:
    """Whether a pipeline is of FLUX.2 [klein], and not of [dev]."""
    return any(kind.__name__.startswith(_KLEIN) for kind in type(pipe).__mro__)


class Flux2Adapter(FluxBlocksAdapter):
    """diffusers' ``Flux2Transformer2DModel``."""

    family = "flux2"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _conversation, is_padded=True),)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        if kwargs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"{type(self.pipe).__name__} keeps keys and values of its reference pictures from step to step, of "
                "which an edit would know nothing: edit with Flux2KleinPipeline, which computes them at each step"
            )
        return super().read(args, kwargs)
