"""HiDream-I1: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is image, text. Text tokens are those of T5, those of Llama's last layer, which both go through the
blocks, and those of the layer of Llama's that is the block's own, which do not: a word stands there three times. The
experts behind a layer's attention look at each token by itself. Tokens of pictures that are not square are filled up to
a number of the model's, at no place: what fills them up takes the attention of scores of zero. The batch is
[unconditional, conditional] in one call, and padding of texts is attended to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...text_parts import TextPart
from ..sites import Site, dual_and_single
from .adapter import ModelCall
from .transformer import TransformerAdapter

__all__ = ["HiDreamImageAdapter"]

_LLAMA = TextPart("tokenizer_4", ("text_encoder_4",))


class HiDreamImageAdapter(TransformerAdapter):
    """diffusers' ``HiDreamImageTransformer2DModel``."""

    family = "hidream"
    text_parts = (TextPart("tokenizer_3", ("text_encoder_3",)), _LLAMA, _LLAMA)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(module.config.patch_size)
        return dual_and_single(module, patch, "double_stream_blocks", "single_stream_blocks", "block.attn1")

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given, module = self.named(args, kwargs), self.module
        sample, patch = given["hidden_states"], self.sites[0].patch
        if sample.ndim != 4 or given.get("hidden_states_masks") is not None:
            raise ValueError(
                f"expected latents [B, C, h, w] of pictures of one size and no mask of them, got {list(sample.shape)} "
                f"and {'no' if given.get('hidden_states_masks') is None else 'a'} mask: HiDream-I1 is edited as its "
                "pipeline calls it"
            )
        height, width = sample.shape[-2:]
        capacity: Any = module.max_seq
        return ModelCall(
            sample,
            given["timesteps"],
            (height, width),
            references=0 if height == width else capacity - height // patch * (width // patch),
            arguments=(args, kwargs),
        )
