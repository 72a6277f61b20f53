"""Chroma: FLUX.1's dual and single blocks, of which the padding of texts is told apart by a mask.

The order in a layer is text, image, and texts of every length are padded to one, so that what is masked stands in the
middle: a row's mask is ones for its text and for the one token of padding that Chroma keeps, zeros for the rest of the
padding, and ones for the image. As truth values it takes the attention of what it leaves out. As numbers, which
diffusers' pipelines make of it, it is added to the scores: padding still takes attention, e times less than scores give
it. Both are computed as they are. The pipelines guide by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..text_parts import TextPart
from .adapter import ModelCall
from .flux import FluxBlocksAdapter
from .once import once_a_tensor

__all__ = ["ChromaAdapter"]


class ChromaAdapter(FluxBlocksAdapter):
    """diffusers' ``ChromaTransformer2DModel``."""

    family = "chroma"
    text_parts = (TextPart("tokenizer", ("text_encoder",)),)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        call, given = super().read(args, kwargs), self.named(args, kwargs)
        if call.references:
            raise ValueError(
                f"the model got {call.references} tokens of reference pictures, and Chroma has none: leave them out"
            )
        mask = given.get("attention_mask")
        if mask is None:
            return call
        lengths = _checked(mask, given["encoder_hidden_states"].shape[1], call)
        # Where the mask is numbers, each layer is told them and no key is left out.
        return replace(call, text_lengths=lengths) if mask.dtype == torch.bool else call


def _checked(mask: torch.Tensor, texts: int, call: ModelCall) -> tuple[int, ...] | None:
    """Text tokens of each row that the mask leaves in; None where it leaves out nothing.

    Args:
        mask: of text tokens and then image tokens, [rows or 1, T + N].
        texts: T.
        call: the call.

    Raises:
        ValueError: a mask of another shape or dtype, or one that leaves out anything but the ends of texts.
    """
    shape, tokens = tuple(mask.shape), texts + call.sample.shape[1]
    if shape not in ((call.rows, tokens), (1, tokens)):
        raise ValueError(
            f"expected a mask [{call.rows}, {tokens}] of text and image tokens, got one of {list(shape)}: append ones "
            "for the image's tokens to the mask of the texts, as diffusers' pipelines do"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"expected a mask of truth values or floating-point ones and zeros, got {mask.dtype}: convert it"
        )
    found = _zeros(mask)
    if any(begin < end != texts for begin, end in found):
        raise ValueError(
            "the mask leaves out other tokens than the last ones of texts, such as tokens of the image or text that is "
            "followed by text that counts: pad texts at their ends, and leave image tokens in"
        )
    if all(begin == end for begin, end in found):
        return None
    lengths = tuple(begin if begin < end else texts for begin, end in found)
    return lengths * (call.rows // len(lengths))


@once_a_tensor
def _zeros(mask: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Of each row of a mask [rows, tokens], where its zeros begin and end; (0, 0) where there are none.

    Raises:
        ValueError: numbers other than ones and zeros, or zeros in more than one place.
    """
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("expected a mask of ones and zeros, got other numbers: pass truth values")
    found = []
    for row in mask.tolist():
        zeros = [place for place, value in enumerate(row) if not value]
        if zeros and zeros[-1] - zeros[0] + 1 != len(zeros):
            raise ValueError(
                "the mask of tokens has holes: it leaves out some in more than one place of a row; pad texts at their "
                "ends"
            )
        found.append((zeros[0], zeros[-1] + 1) if zeros else (0, 0))
    return tuple(found)
