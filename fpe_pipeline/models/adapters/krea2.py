"""Krea 2: blocks with one sequence of text and image tokens, text first.

Several heads of queries share one of keys and values. A prompt stands inside a text of the pipeline's, and its padding
in the middle of that: what counts of a text is told by a mask. Text tokens are not turned, so that the ones that count
can be put first. The pipeline guides by a second call, with the prompts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...text_parts import Template, TextPart
from ..sites import Site
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor
from .padding import counted_tokens

__all__ = ["Krea2Adapter"]

_PACKED = 2


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, after = pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix
    return Template(before, after, pipe.prompt_template_encode_start_idx)


class Krea2Adapter(NamedCallsAdapter):
    """diffusers' ``Krea2Transformer2DModel``."""

    family = "krea2"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template, is_padded=True),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(getattr(self.pipe, "patch_size", _PACKED))
        return tuple(
            Site(f"transformer_blocks.{index}.attn", "single", "joint", index, block.attn.num_heads, 0, (), patch=patch)
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample, texts = given["hidden_states"], given["encoder_hidden_states"].shape[1]
        first, (height, width) = _grid(given["position_ids"])
        if first < texts or height * width != sample.shape[1]:
            raise ValueError(
                f"the model got {texts} text tokens and {sample.shape[1]} image tokens, whose places are a grid of "
                f"{height} x {width} from token {first} on: text has to be at no place, and the image at a whole grid"
            )
        mask = given.get("encoder_attention_mask")
        patch = self.sites[0].patch
        return ModelCall(
            sample,
            given["timestep"],
            (height * patch, width * patch),
            half=self._half(),
            text_lengths=None if mask is None else counted_tokens(mask),
            arguments=(args, kwargs),
        )


@once_a_tensor
def _grid(places: torch.Tensor) -> tuple[int, tuple[int, int]]:
    """The first token that is at another place than 0, and rows and columns of all places.

    Args:
        places: of text and image tokens [T + N, 3]: (time, row, column).
    """
    away = places.any(1).nonzero()
    first = int(away[0]) if len(away) else len(places)
    height, width = (int(side) + 1 for side in places.amax(0).tolist()[1:])
    return first, (height, width)
