"""HunyuanVideo: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is image, text, and the image's tokens are those of all frames. A prompt is encoded inside a
template, of which the first tokens are dropped; padding of texts is masked. Guidance is part of the model; where the
pipeline guides with a negative prompt as well it calls the model twice, in contexts named "cond" and "uncond".
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..text_parts import Template, TextPart
from .adapter import ModelCall
from .named_calls import NamedCallsAdapter
from .padding import text_lengths
from .sites import Place, Site

__all__ = ["HunyuanVideoAdapter"]


def _template(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    default = inspect.signature(type(pipe).encode_prompt).parameters["prompt_template"].default
    given = arguments.get("prompt_template", default)
    before, _, after = given["template"].partition("{}")
    return Template(before, after, given.get("crop_start") or 0)


class HunyuanVideoAdapter(NamedCallsAdapter):
    """diffusers' ``HunyuanVideoTransformer3DModel``."""

    family = "hunyuan_video"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _template, is_padded=True),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        blocks: list[tuple[Place, str, Any]] = []
        blocks += [("dual", f"transformer_blocks.{i}", b) for i, b in enumerate(module.transformer_blocks)]
        blocks += [
            ("single", f"single_transformer_blocks.{i}", b) for i, b in enumerate(module.single_transformer_blocks)
        ]
        patch = int(module.config.patch_size)
        return tuple(
            Site(f"{path}.attn", place, "joint", index, block.attn.heads, 0, (), patch=patch)
            for index, (place, path, block) in enumerate(blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = inspect.signature(type(self.module).forward).bind(None, *args, **kwargs).arguments
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // module.config.patch_size_t),
            half=self._half(),
            text_lengths=text_lengths(given["encoder_attention_mask"]),
            arguments=(args, kwargs),
        )
