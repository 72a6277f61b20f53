"""JoyImage: blocks with a stream of image tokens and one of text tokens, and one softmax over both.

The order in a layer is image, text. Latents are [B, pictures, C, frames, h, w]: where a picture is shown it stands
first there and behind the one that is denoised among the tokens, and the text encoder sees it before the prompt. A
prompt is encoded inside a template, of which the first tokens are dropped. Texts are padded to the longest of a call,
and padding is attended to. Its pipeline guides by a second call, after the one that sees the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...text_parts import Template, TextPart, plain_tokenizer
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import warn_of_padding

__all__ = ["JoyImageAdapter"]

#: What its pipeline writes before a prompt beside a picture, and behind it, inside its template.
_SHOWS = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n"


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    shows = arguments.get("images") is not None
    kind = "multiple_images" if shows else arguments.get("template_type", "image")
    before, _, after = pipe.prompt_template_encode[kind].partition("{}")
    if shows:
        before, after = before + _SHOWS[0], _SHOWS[1] + after
    return Template(before, after, pipe.prompt_template_encode_start_idx[kind], shows=shows)


class JoyImageAdapter(NamedCallsAdapter):
    """diffusers' ``JoyImageEditTransformer3DModel``."""

    family = "joyimage"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template),)

    def __init__(self, pipe: Any | None, model: Any) -> None:
        super().__init__(pipe, model)
        reader = getattr(pipe, "processor", None)
        if getattr(plain_tokenizer(reader), "padding_side", "right") != "right":
            self.words_refused = (
                "the pipeline's processor pads texts in front, where JoyImage's pipeline drops padding in the place of "
                'its template, so that no word is found: pipe.processor.tokenizer.padding_side = "right"'
            )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        _, patch, _ = module.config.patch_size
        return tuple(
            Site(f"double_blocks.{index}.attn", "dual", "joint", index, block.attn.heads, 0, (), patch=patch)
            for index, block in enumerate(module.double_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        each, rows, columns = module.config.patch_size
        frames, height, width = sample.shape[-3:]
        shown = sample.shape[1] - 1 if sample.ndim == 6 else 0
        tokens = frames // each * (height // rows) * (width // columns)
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // each),
            half=self._half(),
            references=shown * tokens,
            arguments=(args, kwargs),
        )

    def follow(self) -> Callable[[], None]:
        leave = super().follow()
        encoder = getattr(self.pipe, "text_encoder", None)
        if not isinstance(encoder, torch.nn.Module):
            return leave
        told = encoder.register_forward_pre_hook(torch.compiler.disable(_tell_of_padding), with_kwargs=True)

        def end() -> None:
            told.remove()
            leave()

        return end


def _tell_of_padding(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn where texts of one call are padded, as none is alone."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        warn_of_padding("JoyImage", mask.sum(1).tolist(), mask.shape[1])
