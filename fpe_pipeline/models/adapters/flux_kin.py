"""Models whose blocks are FLUX.1's, and what differs around them: Ovis-Image, LongCat-Image, Bria 3 and FIBO.

Ovis-Image and LongCat-Image encode prompts with a language model, inside a text of their own, and guide by a second
call. Bria 3 encodes one prompt at a time with T5, fills it up with zeros, and guides in one call of both halves. None
of these masks its padding.

FIBO guides in one call too. Half of each text token's numbers are, in every block, those of another layer of its
language model. A token of its image is one latent, or as many as its pipeline packs. Its padding is masked, and where a
batch has some every layer is told so. Tokens of reference pictures follow the image's (FIBO Edit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from ...text_parts import Template, TextPart, conversation
from .adapter import Half, ModelCall
from .flux import FluxBlocksAdapter
from .padding import lengths_before_images

__all__ = ["BriaAdapter", "BriaFiboAdapter", "LongCatImageAdapter", "OvisImageAdapter"]


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


class _GuidedInOneCall(FluxBlocksAdapter):
    guides_apart = False

    def _half(self) -> Half:
        return "as guided"


class BriaAdapter(_GuidedInOneCall):
    """diffusers' ``BriaTransformer2DModel``."""

    family = "flux_kin"
    kind = "bria"
    text_parts = (TextPart("tokenizer", ("text_encoder",), one_at_a_time=True),)


class BriaFiboAdapter(_GuidedInOneCall):
    """diffusers' ``BriaFiboTransformer2DModel``."""

    family = "bria_fibo"
    patch = 1
    text_parts = (TextPart("tokenizer", ("text_encoder",), in_one_batch=True),)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        call, given = super().read(args, kwargs), self.named(args, kwargs)
        mask = (given.get("joint_attention_kwargs") or {}).get("attention_mask")
        if mask is None:
            return call
        if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            raise ValueError(
                f"expected a mask of truth values [rows, 1, 1, tokens], got {mask.dtype} {list(mask.shape)}: what each "
                "token looks at by itself is no padding of texts, and an edit does not know it; call the pipeline of "
                "diffusers 0.42 or a later one"
            )
        texts = given["encoder_hidden_states"].shape[1]
        return replace(call, text_lengths=lengths_before_images(mask[:, 0, 0], texts, *call.sample.shape[:2]))

    def longer_texts(self, kwargs: Mapping[str, Any], tokens: Mapping[bool, int]) -> dict[str, Any]:
        texts, told = kwargs["encoder_hidden_states"], kwargs.get("joint_attention_kwargs") or {}
        rows, count = texts.shape[:2]
        beyond = max(tokens.values(), default=0) - count
        if beyond <= 0:
            return {}
        mask = told.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, 1, 1, count + kwargs["hidden_states"].shape[1], dtype=torch.bool)
        seen = torch.cat([functional.pad(mask[..., :count], (0, beyond)), mask[..., count:]], dim=-1)
        return {
            "encoder_hidden_states": functional.pad(texts, (0, 0, 0, beyond)),
            "text_encoder_layers": [functional.pad(each, (0, 0, 0, beyond)) for each in kwargs["text_encoder_layers"]],
            "txt_ids": functional.pad(kwargs["txt_ids"], (0, 0, 0, beyond)),
            "joint_attention_kwargs": {**told, "attention_mask": seen.to(texts.device)},
        }
