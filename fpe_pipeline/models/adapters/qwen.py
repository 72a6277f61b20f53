"""Qwen-Image: blocks with a stream of image tokens and one of text tokens, and one softmax over both.

The order in a layer is text, image. A prompt is encoded inside a template, of which the first tokens are dropped; texts
are padded to the longest of the call, and the model receives a mask of what is no padding. Its pipeline guides by a
second call, in contexts named "cond" and "uncond"; the step is the scheduler's. In Qwen-Image-Edit tokens of reference
pictures follow those that are denoised, and the text encoder sees the pictures before the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from ...text_parts import Template, TextPart, said
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import text_lengths

__all__ = ["QwenImageAdapter"]

_PACKED = 2


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = said(pipe, "prompt_template_encode").partition("{}")
    dropped = said(pipe, "prompt_template_encode_start_idx")
    return Template(before, after, dropped, shows=hasattr(pipe, "processor"))


class QwenImageAdapter(NamedCallsAdapter):
    """diffusers' ``QwenImageTransformer2DModel``."""

    family = "qwen"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(
            Site(f"transformer_blocks.{index}.attn", "dual", "joint", index, block.attn.heads, 0, (), patch=_PACKED)
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        mask = given.get("encoder_hidden_states_mask")
        if given.get("additional_t_cond") is not None:
            raise ValueError(
                "Qwen-Image-Layered denoises several layers of a picture together, and an edit speaks of one: edit "
                "with QwenImagePipeline or QwenImageEditPipeline"
            )
        height, width, references = _size(given["img_shapes"])
        return ModelCall(
            given["hidden_states"],
            given["timestep"],
            (height, width),
            half=self._half(),
            text_lengths=None if mask is None else text_lengths(mask),
            references=references,
            arguments=(args, kwargs),
        )

    def longer_texts(self, kwargs: Mapping[str, Any], tokens: Mapping[bool, int]) -> dict[str, Any]:
        texts, mask = kwargs["encoder_hidden_states"], kwargs.get("encoder_hidden_states_mask")
        beyond = tokens.get(self._half() != "unconditional", 0) - texts.shape[1]
        if beyond <= 0:
            return {}
        mask = texts.new_ones(texts.shape[:2], dtype=torch.long) if mask is None else mask
        return {
            "encoder_hidden_states": functional.pad(texts, (0, 0, 0, beyond)),
            "encoder_hidden_states_mask": functional.pad(mask, (0, beyond)),
        }


def _size(shapes: Any) -> tuple[int, int, int]:
    """(height, width) of the latents, and tokens of reference pictures, of the pictures in each row.

    Args:
        shapes: for each row its (frames, rows, columns) of tokens, or a list of them: of the picture that is denoised,
            and of those that are shown.
    """
    rows = {tuple(map(tuple, row)) if isinstance(row, list) else (tuple(row),) for row in shapes}
    if len(rows) > 1:
        raise ValueError(
            f"the model got rows of the sizes {sorted(rows)}, and an edit is between rows of one: pass pictures of one "
            "size for all prompts"
        )
    ((frames, height, width), *shown) = rows.pop()
    if frames != 1:
        raise ValueError(f"the model got {frames} layers of a picture, and an edit speaks of one")
    return height * _PACKED, width * _PACKED, sum(math.prod(picture) for picture in shown)
