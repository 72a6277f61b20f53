"""HunyuanVideo 1.5 and HunyuanImage 2.1: the layers of HunyuanVideo, with guiders, and with what prompts quote.

The order in a layer is image, text. Text tokens are those of a picture (1.5), of what a prompt quotes, which an encoder
of its own spells, and of the prompt inside a template; of each row those that count stand first, the rest is masked.
A guider says how often the model is called in a step, and in which contexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ...text_parts import Template, TextPart
from ..sites import Site, dual_and_single
from .adapter import Half, ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor
from .padding import counted_tokens

__all__ = ["GuidedAdapter", "HunyuanImageAdapter", "HunyuanVideo15Adapter"]

_GUIDED: dict[str, Half] = {"pred_cond": "conditional", "pred_uncond": "unconditional"}
_NONE = -1  # in the place of a token that is no text


def _placed(before: str, after: str, start: int, ahead: int, behind: int) -> Template:
    """Text around prompts, of which the first tokens are dropped, with so many other tokens ahead and behind."""
    return Template(
        before, after, start - ahead, received=lambda tokens: pad(tokens[:, start:], (ahead, behind), value=_NONE)
    )


def _of_video(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    if pipe.tokenizer is None:
        return Template("")
    said = [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": "{}"}]
    written = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    before, _, after = written.partition("{}")
    picture, quoted = pipe.vision_num_semantic_tokens, pipe.tokenizer_2_max_length
    ahead = picture if hasattr(pipe, "image_encoder") else 0
    return _placed(before, after, pipe.prompt_template_encode_start_idx, ahead, picture - ahead + quoted)


def _of_picture(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    before, _, after = pipe.prompt_template_encode.partition("{}")
    return _placed(before, after, pipe.prompt_template_encode_start_idx, 0, pipe.tokenizer_2_max_length)


class GuidedAdapter(NamedCallsAdapter):
    """A transformer that a guider calls, in contexts of its own names."""

    def _half(self) -> Half:
        if self._context is None or self._context in _GUIDED:
            return _GUIDED.get(self._context or "", "as guided" if self.pipe is None else "conditional")
        guider = type(getattr(self.pipe, "guider", None)).__name__
        raise ValueError(
            f"{guider} calls the model for {self._context!r}, in a way that an edit does not know: guide by what the "
            "pipeline guides by as it is loaded, or by ClassifierFreeGuidance"
        )


class HunyuanVideo15Adapter(GuidedAdapter):
    """diffusers' ``HunyuanVideo15Transformer3DModel``."""

    family = "hunyuan_video"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _of_video, is_padded=True, quotes="text_encoder_2"),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return dual_and_single(module, int(module.config.patch_size))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given, module = self.named(args, kwargs), self.module
        config: Any = module.config
        sample, picture = given["hidden_states"], given["image_embeds"]
        frames, height, width = sample.shape[-3:]
        shown = picture.shape[1] if _is_any(picture) else 0
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // config.patch_size_t),
            half=self._half(),
            text_lengths=_lengths_together(given, shown),
            arguments=(args, kwargs),
        )


class HunyuanImageAdapter(GuidedAdapter):
    """diffusers' ``HunyuanImageTransformer2DModel``."""

    family = "hunyuan_video"
    kind = "hunyuan_image"
    text_parts = (TextPart("tokenizer", ("text_encoder",), _of_picture, is_padded=True, quotes="text_encoder_2"),)

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        return dual_and_single(module, int(module.config.patch_size[-1]))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sample = given["hidden_states"]
        if sample.ndim != 4:
            raise ValueError(
                f"expected latents [B, C, h, w] of a picture, got {list(sample.shape)}: HunyuanImage is edited as its "
                "pipelines call it"
            )
        return ModelCall(
            sample,
            given["timestep"],
            (sample.shape[-2], sample.shape[-1]),
            half=self._half(),
            text_lengths=_lengths_together(given, 0),
            arguments=(args, kwargs),
        )


def _lengths_together(given: Mapping[str, Any], shown: int) -> tuple[int, ...]:
    """Of each row, how many text tokens count: of the prompt, of what it quotes, and so many of a picture.

    Args:
        given: arguments of a call, with masks [rows, tokens] of both texts, or of the first alone.
        shown: tokens of a picture.
    """
    masks = (given["encoder_attention_mask"], given.get("encoder_attention_mask_2"))
    return tuple(shown + sum(parts) for parts in zip(*(counted_tokens(m) for m in masks if m is not None), strict=True))


@once_a_tensor
def _is_any(embeddings: torch.Tensor) -> bool:
    return bool(embeddings.any())
