"""Kandinsky 6: blocks of self-attention over all tokens of a picture or a video, and of cross-attention over its text.

Sound, where there is any, has attention of its own to itself, to the text and to the frames, and is each row's own.
Latents have their channels last; a given picture is one frame more, behind those that are denoised. The text's tokens
attend to each other beforehand, where padding is masked. A prompt is encoded inside a template, of which the first
tokens are dropped. Pipelines name the contexts of their two calls a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .transformer import self_and_cross

__all__ = ["Kandinsky6Adapter"]

_TEMPLATE, _DROPPED = "_PROMPT_TEMPLATE", "_QWEN_CROP_START"


def _said(pipe: Any) -> Mapping[str, Any]:
    """What stands beside the code that encodes prompts: the pipeline itself does not say its template."""
    return getattr(getattr(pipe, "_get_prompt_embeds", None), "__globals__", {})


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = _said(pipe)[_TEMPLATE].partition("{}")
    return Template(before, after, _said(pipe)[_DROPPED])


class Kandinsky6Adapter(NamedCallsAdapter):
    """diffusers' ``Kandinsky6Transformer3DModel``."""

    family = "kandinsky6"
    channels_last = True

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        if pipe is None or {_TEMPLATE, _DROPPED} <= _said(pipe).keys():
            self.text_parts = (TextPart("tokenizer", ("text_encoder",), _template, is_padded=True),)
        else:
            self.words_refused = (
                f"{type(pipe).__name__} encodes prompts inside a template that it does not tell, so that no word is "
                "found there: use an edit that looks for none, such as FreePromptEdit or MasaCtrlEdit"
            )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        _, patch, _ = module.config.patch_size
        names = "video_dec_block.self_attention", "video_dec_block.cross_attention"
        return tuple(self_and_cross("visual_transformer_blocks", module.visual_transformer_blocks, patch, names))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[1:4]
        size = (height, width, frames // module.config.patch_size[0])
        return ModelCall(sample, given["timestep"], size, half=self._half(), arguments=(args, kwargs))
