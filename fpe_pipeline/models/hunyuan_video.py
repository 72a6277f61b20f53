"""HunyuanVideo: dual blocks with a stream of image tokens and one of text tokens, then single blocks with one for both.

The order in a layer is image, text, and the image's tokens are those of all frames. A prompt is encoded inside a
template, of which the first tokens are dropped; padding of texts is masked. Guidance is part of the model; where the
pipeline guides with a negative prompt as well it calls the model twice, in contexts named "cond" and "uncond".

HunyuanVideo 1.5 has dual blocks alone. Its text tokens are those of a picture, of what a prompt quotes and of the
prompt, of each row those that count first; a guider says how often the model is called, and in which contexts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..text_parts import Template, TextPart
from .adapter import Half, ModelCall
from .named_calls import NamedCallsAdapter
from .once import once_a_tensor
from .padding import text_lengths
from .sites import Place, Site

__all__ = ["HunyuanVideo15Adapter", "HunyuanVideoAdapter"]

_GUIDED: dict[str, Half] = {"pred_cond": "conditional", "pred_uncond": "unconditional"}


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


class HunyuanVideo15Adapter(NamedCallsAdapter):
    """diffusers' ``HunyuanVideo15Transformer3DModel``."""

    family = "hunyuan_video"
    words_refused = (
        "HunyuanVideo 1.5 puts what a prompt quotes before it, as tokens of another encoder, so that no word is looked "
        "for yet: use an edit of image tokens, such as FreePromptEdit or ConsistEdit, with a picture where it "
        "takes a mask"
    )

    def find_sites(self) -> tuple[Site, ...]:
        module: Any = self.module
        patch = int(module.config.patch_size)
        return tuple(
            Site(f"transformer_blocks.{index}.attn", "dual", "joint", index, block.attn.heads, 0, (), patch=patch)
            for index, block in enumerate(module.transformer_blocks)
        )

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        module: Any = self.module
        sample = given["hidden_states"]
        frames, height, width = sample.shape[-3:]
        return ModelCall(
            sample,
            given["timestep"],
            (height, width, frames // module.config.patch_size_t),
            half=self._half(),
            text_lengths=_lengths_together(
                given["encoder_attention_mask"], given["encoder_attention_mask_2"], given["image_embeds"]
            ),
            arguments=(args, kwargs),
        )

    def _half(self) -> Half:
        if self._context is None or self._context in _GUIDED:
            return _GUIDED.get(self._context or "", "as guided" if self.pipe is None else "conditional")
        guider = type(getattr(self.pipe, "guider", None)).__name__
        raise ValueError(
            f"{guider} calls the model for {self._context!r}, in a way that an edit does not "
            "know: guide by ClassifierFreeGuidance, as the pipeline does by default"
        )


def _lengths_together(text: torch.Tensor, quoted: torch.Tensor, picture: torch.Tensor) -> tuple[int, ...]:
    """Of each row, how many text tokens count: of the prompt, of what it quotes, and of a picture, if there is one.

    Args:
        text, quoted: masks [rows, tokens].
        picture: embeddings [rows, tokens, C]; all zeros where there is none.
    """
    shown = picture.shape[1] if _is_any(picture) else 0
    return tuple(shown + sum(parts) for parts in zip(_counts(text), _counts(quoted), strict=True))


@once_a_tensor
def _counts(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(count) for count in mask.bool().sum(1).tolist())


@once_a_tensor
def _is_any(embeddings: torch.Tensor) -> bool:
    return bool(embeddings.any())
