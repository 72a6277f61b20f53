"""Qwen-Image 2.1: blocks with one sequence of text and image tokens, text first, of which the text looks back alone.

A text token looks at what stands before it, and no text at the image: keys and values of texts are the same at every
step, and the pipeline keeps them from the first one on. Pictures that are shown stand among the text's tokens, where
its encoder sees them, and their padding behind all of these. The pipeline guides by a second call, in contexts named
"cond" and "uncond".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor
from .padding import text_lengths

__all__ = ["QwenImage21Adapter"]

#: Tokens of a picture for each that its encoder makes of it.
_TOKENS_A_SLOT = 4


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = pipe.prompt_template_t2i.partition("{}")
    # What the pipeline writes before pictures is told apart from a prompt by the distance from the end.
    padded = getattr(pipe, "padded_tokens", 0)  # of our pipeline, in a call that is told of them
    return Template(before, after, pipe._drop_idx, shows=True, replaced=pipe._img_token_id, at_least=padded)


class QwenImage21Adapter(NamedCallsAdapter):
    """diffusers' ``QwenImage21Transformer2DModel``."""

    family = "qwen21"
    text_parts = (TextPart("processor", ("text_encoder",), _template),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return tuple(
            Site(f"transformer_blocks.{index}.attn", "single", "joint", index, block.attn.heads, 0, ())
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        mask, texts = given.get("encoder_hidden_states_mask"), given["encoder_hidden_states"].shape[1]
        *pictures, (_, height, width) = given["img_shapes"][0]  # all rows have one layout, that of the first
        slots = [place for place in _slots(given["img_mask"]) if place < texts]
        lengths = None if mask is None else text_lengths(mask)
        return ModelCall(
            given["hidden_states"],
            given["timestep"],
            (height, width),
            half=self._half(),
            text_lengths=None if lengths is None else tuple(length - len(slots) for length in lengths),
            references=sum(map(math.prod, pictures)),
            shown=_shown(slots, pictures),
            keeps_texts=True,
            arguments=(args, kwargs),
        )

    def longer_texts(self, kwargs: Mapping[str, Any], tokens: Mapping[bool, int]) -> dict[str, Any]:
        texts, mask = kwargs["encoder_hidden_states"], kwargs.get("encoder_hidden_states_mask")
        slots, count = kwargs["img_mask"], texts.shape[1]
        beyond = tokens.get(self._half() != "unconditional", 0) - count
        if beyond <= 0:
            return {}
        mask = texts.new_ones(texts.shape[:2], dtype=torch.long) if mask is None else mask
        return {
            "encoder_hidden_states": functional.pad(texts, (0, 0, 0, beyond)),
            "encoder_hidden_states_mask": functional.pad(mask, (0, beyond)),
            "img_mask": torch.cat([functional.pad(slots[:, :count], (0, beyond)), slots[:, count:]], dim=1),
        }


@once_a_tensor
def _slots(mask: torch.Tensor) -> tuple[int, ...]:
    """The places of the encoder's tokens that are pictures, in the first row of a mask of them [rows, tokens]."""
    return tuple(int(place) for place in mask[0].nonzero()[:, 0].tolist())


def _shown(slots: Sequence[int], pictures: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """For each picture that is shown, its first token and the one behind its last.

    Args:
        slots: the encoder's tokens that are pictures.
        pictures: of each one (frames, rows, columns) of tokens.
    """
    found, seen = [], 0
    for picture in pictures:
        count = math.prod(picture)
        first = slots[seen // _TOKENS_A_SLOT] + (_TOKENS_A_SLOT - 1) * (seen // _TOKENS_A_SLOT)
        found.append((first, first + count))
        seen += count
    return tuple(found)
