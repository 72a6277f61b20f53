"""HunyuanVideo: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is image, text, and the image's tokens are those of all frames. A prompt is encoded inside a
template, of which the first tokens are dropped; padding of texts is masked. Guidance is part of the model; where the
pipeline guides with a negative prompt as well it calls the model twice, in contexts named "cond" and "uncond".
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...text_parts import Template, TextPart
from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import text_lengths

__all__ = ["HunyuanVideoAdapter"]


#: The tokens behind a prompt that the pipelines take off a template to see where prompts begin.
_BEHIND, _BEHIND_A_PICTURE = 2, 5
#: Tokens that the pipeline that shows a picture leaves out behind prompts: the header of the answer.
_HEADER = 4


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    parameters = inspect.signature(type(pipe).encode_prompt).parameters
    given = arguments.get("prompt_template", parameters["prompt_template"].default)
    before, _, after = given["template"].partition("{}")
    shows, cropped = "image_embed_interleave" in parameters, given.get("crop_start")
    if cropped is None:  # counted as the pipelines do
        ids = pipe.tokenizer(given["template"], padding="max_length")["input_ids"]
        cropped = len(ids) - (_BEHIND_A_PICTURE if shows else _BEHIND)
    if not shows:
        return Template(before, after, cropped)
    # One token of the template is a picture's mark, for which the encoder receives `length` and the model every n-th.
    start, stop, length = (given.get(f"image_emb_{n}", d) for n, d in (("start", 5), ("end", 581), ("len", 576)))
    every = arguments.get("image_embed_interleave", parameters["image_embed_interleave"].default)
    picture = slice(start, stop, every if 0 < every < 6 else 1)

    def received(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[:, picture], tokens[:, cropped - 1 + length : tokens.shape[1] - _HEADER]], 1)

    return Template(before, after, cropped - len(range(stop)[picture]), received=received)


class HunyuanVideoAdapter(NamedCallsAdapter):
    """diffusers' ``HunyuanVideoTransformer3DModel``."""

    family = "hunyuan_video"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template, is_padded=True),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return dual_and_single(module, int(module.config.patch_size))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        lengths = text_lengths(given["encoder_attention_mask"])
        if lengths is not None and len(lengths) == 1:  # one negative prompt stands for all rows
            lengths *= sample.shape[0]
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // module.config.patch_size_t),
            half=self._half(),
            text_lengths=lengths,
            arguments=(args, kwargs),
        )
